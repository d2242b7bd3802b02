# %% [markdown]
# # Compare samplers at one noise
#
# `seed` gives every run the same initial noise, so what differs is the sampler and its number of steps.

# %%
import matplotlib.pyplot as plt

import cogvid

pipe = cogvid.load("tiny-i2v")
prompt, image = "the red circle moves right", cogvid.load_image("scripts/demo.png")


def latents(scheduler, steps):
    """Return `[T, C, h, w]` of one run."""
    options = {"scheduler": scheduler, "num_inference_steps": steps, "use_dynamic_cfg": False}
    return pipe(prompt, image=image, seed=42, output_type="latent", progress=False, **options).frames[0]


# %% [markdown]
# The distance to what ddim gives at many steps, for each sampler.

# %%
steps = [4, 8, 10]
target = latents("ddim", 25)
for name in cogvid.SAMPLERS:
    far = [((latents(name, count) - target).norm() / target.norm()).item() for count in steps]
    plt.plot(steps, far, marker="o", label=name)
plt.xlabel("steps")
plt.ylabel("relative RMS distance from ddim at 25 steps")
plt.legend()
plt.show()

# %% [markdown]
# And the video at the fewest steps.

# %%
pipe(prompt, image=image, seed=42, scheduler="ddim", num_inference_steps=4, use_dynamic_cfg=False, progress=False)
