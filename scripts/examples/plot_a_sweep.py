# %% [markdown]
# # Plot a sweep
#
# A batch makes a video for each combination of values, and a manifest with the seconds and the memory of each.

# %%
import json

import matplotlib.pyplot as plt

import cogvid
from cogvid.cli import main

sweep = ["--sweep", "num_inference_steps=2,4,5", "guidance_scale=1,4"]
common = ["--image", "scripts/demo.png", "--seed", "42", "-o", "sweep"]
assert main(["batch", "--prompt", "the red circle moves right", *sweep, *common]) == 0

# %% [markdown]
# How far each video is from the one with the most steps at the same guidance.

# %%
with open("sweep/manifest.jsonl") as file:
    jobs = [json.loads(line) for line in file]
frames = {each["output"]: cogvid.read_video(f"sweep/{each['output']}")[0].float() for each in jobs}
for scale in sorted({each["job"]["guidance_scale"] for each in jobs}):
    row = sorted(
        (each for each in jobs if each["job"]["guidance_scale"] == scale),
        key=lambda each: each["job"]["num_inference_steps"],
    )
    best = frames[row[-1]["output"]]
    steps = [each["job"]["num_inference_steps"] for each in row]
    far = [(frames[each["output"]] - best).abs().mean().item() for each in row]
    plt.plot(steps, far, marker="o", label=f"guidance {scale:g}")
plt.xlabel("steps")
plt.ylabel("mean difference from the most steps, of 255")
plt.legend()
plt.show()
