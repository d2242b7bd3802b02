# %% [markdown]
# # Make a video
#
# The cells of this file are those of a notebook: `jupytext --to ipynb generate.py` makes one, and editors show it as
# one. Run it in the root of the repository. The model is shipped, so nothing is downloaded.

# %%
import cogvid

pipe = cogvid.load("tiny-i2v")
pipe

# %% [markdown]
# An image and a prompt go in. The output plays in the notebook.

# %%
image = cogvid.load_image("scripts/demo.png")
out = pipe("the red circle moves right", image=image, seed=42)
out

# %% [markdown]
# It knows how it was made, and is saved as MP4, GIF, WebP or a sheet of frames.

# %%
print(out, "->", out.save("out.mp4"))
{name: out.provenance[name] for name in ("model", "seed", "num_inference_steps", "guidance_scale", "scheduler")}
