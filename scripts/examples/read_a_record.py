# %% [markdown]
# # Read the record of a video, and make it again
#
# Every video has the record of its run in its metadata.

# %%
import os

import cogvid
from cogvid.cli import main

command = ["generate", "the red circle moves right", "--image", "scripts/demo.png", "--seed", "42"]
assert main([*command, "--num-inference-steps", "8", "-o", "first.mp4"]) == 0

# %%
record = cogvid.read_record("first.mp4")
for name in ("prompt", "model", "seed", "num_inference_steps", "timesteps", "guidance_schedule", "versions"):
    print(f"{name}: {record[name]}")

# %% [markdown]
# `replay` reads the record alone. On the same machine, the file has the same bytes.

# %%
assert main(["replay", "first.mp4", "-o", "again.mp4"]) == 0
with open("first.mp4", "rb") as first, open("again.mp4", "rb") as again:
    print("the same bytes:", first.read() == again.read(), os.path.getsize("again.mp4"))

# %%
from IPython.display import Video

Video("again.mp4", embed=True, width=256)
