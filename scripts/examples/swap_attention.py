# %% [markdown]
# # Swap the attention
#
# An attention is a function of q, k, v and what the block is told. This one lets each video token see the text and its
# own frame alone, at every layer but the first two.

# %%
import dataclasses

import torch

import cogvid

pipe = cogvid.load("tiny-i2v")
full = pipe.transformer.ops.attention


def own_frame(q, k, v, context):
    """Each tensor is `[B, N, heads, head_dim]`; returns `[B, N, heads * head_dim]`."""
    if context.layer < 2:
        return full(q, k, v, context)
    text, (frames, height, width) = context.text_len, context.grid
    parts = [full(q[:, :text], k, v, context)]
    for frame in range(frames):
        own = slice(text + frame * height * width, text + (frame + 1) * height * width)
        keys, values = (torch.cat([x[:, :text], x[:, own]], dim=1) for x in (k, v))
        parts.append(full(q[:, own], keys, values, context))
    return torch.cat(parts, dim=1)


# %% [markdown]
# The same prompt, picture and noise, with both.

# %%
prompt, image = "the red circle moves right", cogvid.load_image("scripts/demo.png")
before = pipe(prompt, image=image, seed=42, output_type="uint8")
before

# %%
pipe.set_ops(dataclasses.replace(pipe.transformer.ops, attention=own_frame))
after = pipe(prompt, image=image, seed=42, output_type="uint8")
after

# %% [markdown]
# How far the pixels of each frame moved, in levels of 255.

# %%
moved = (after.frames.float() - before.frames.float()).abs().mean(dim=(0, 2, 3, 4))
print([round(each, 2) for each in moved.tolist()])
assert moved.max() > 0.01
