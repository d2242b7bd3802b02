"""The expert transformer of CogVideoX; equals diffusers' `CogVideoXTransformer3DModel`, all five checkpoints.

Text and video tokens lie in one buffer `[B, N, D]`, text first, from the embedding to the last block. Projections,
attention and MLP see it whole. Only the adaLN shift, scale and gate differ between the two: the token's index chooses
the row. A video token is a patch of `pt x 2 x 2` latents.

Modules are called. An operation takes a linear's or a norm's weights only where `can_fuse` allows it.

Letters: B batch, C latent channels, T latent frames, h w latent size, L text tokens, S video tokens, N = L + S,
D model width, E text encoder width, pt frames per patch (1, and 2 in CogVideoX 1.5).

Parameters (upstream's names for them are in weights.py):

    patch_proj, text_proj                        embeddings of patches, flattened as (c, pt, ph, pw), and of text;
                                                 upstream's convolution (1.0) is this matrix, unflattened
    pos_embedding                                learned positions of text and video; 5B-I2V only, not a parameter
    {time,ofs}_embed.linear_{in,out}             MLPs on the sinusoids of the timestep and of the constant ofs
    blocks.{i}.modulation1, .norm1               adaLN before attention: (shift, scale, gate) of video, then of text
    blocks.{i}.{q,k,v}_proj, .{q,k}_norm, .out   attention
    blocks.{i}.modulation2, .norm2               adaLN before the MLP
    blocks.{i}.mlp_in, .mlp_out                  MLP
    norm_final, modulation_out, norm_out, proj_out      last norm, adaLN (shift, scale), projection to patches
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cogvid.config import HEAD_DIM_SPLIT, LEARNED_POSITIONS, Grid, TransformerConfig
from cogvid.models.rope import Positions, index_positions, resize_crop_positions, rotary_table, sincos_table
from cogvid.ops import BlockContext, Branch, Ops, Rope, Shard, StepCache, can_fuse, modulate, rotate

OFS = 2.0  # the only value CogVideoX1.5-5B-I2V was trained with


class Transformer(nn.Module):
    """The whole model: noisy latents, text and timestep in, predicted velocity out."""

    pos_embedding: Tensor  # [1, L + S, D], 5B-I2V only

    def __init__(self, config: TransformerConfig, ops: Ops | None = None) -> None:
        """Build with random weights. ops: the operations to run, plain PyTorch by default."""
        super().__init__()
        self.config = config
        self._ops = ops or Ops.torch()
        width = config.hidden_size
        patch_volume = math.prod(config.patch)

        patch_bias = config.patch_bias or config.patch_size_t is not None
        self.patch_proj = nn.Linear(config.in_channels * patch_volume, width, bias=patch_bias)
        self.text_proj = nn.Linear(config.text_embed_dim, width)
        if config.use_learned_positional_embeddings:
            self.register_buffer("pos_embedding", self.initial_pos_embedding())
        self.time_embed = SinusoidMLP(width, config.time_embed_dim)
        if config.ofs_embed_dim is not None:
            self.ofs_embed = SinusoidMLP(config.ofs_embed_dim, config.ofs_embed_dim)

        self.blocks = nn.ModuleList(Block(config, self._ops) for _ in range(config.num_layers))

        self.norm_final = nn.LayerNorm(width, eps=config.norm_eps)
        self.modulation_out = nn.Linear(config.time_embed_dim, 2 * width)
        self.norm_out = nn.LayerNorm(width, eps=config.norm_eps)
        self.proj_out = nn.Linear(width, config.out_channels * patch_volume)

        self._kept_tables: tuple[object, tuple[Tensor | None, Rope | None]] | None = None

    @property
    def ops(self) -> Ops:
        """The operations that the model runs; `set_ops` changes them."""
        return self._ops

    def set_ops(self, ops: Ops) -> None:
        """Run these operations from now on, in every block."""
        self._ops = ops
        for block in self.blocks:
            assert isinstance(block, Block)
            block.ops = ops

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that latents and text must have; a norm's, because linears may be quantised."""
        return self.norm_out.weight.dtype

    def forward(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        timestep: Tensor,
        *,
        step: int | None = None,
        branch: Branch = "cond",
        step_cache: StepCache | None = None,
        learned_positions: str = "sincos",
    ) -> Tensor:
        """Predict the velocity of noisy latents.

        Args:
            latents: `[B, in_channels, T, h, w]` in the model's dtype; what the model is conditioned on, such as image
                latents, is on the channels after the noisy latents. T, h and w must be multiples of the patch.
            prompt_embeds: `[B, L, E]` in the model's dtype.
            timestep: `[B]`, 0 to 999, integer or float.
            step, branch: told to the blocks, attention and step caches; see `BlockContext`.
            step_cache: wraps the block loop; see `StepCache`.
            learned_positions: what a model with learned positions (5B-I2V) adds when the frame count is not the
                trained one: "sincos" as diffusers does, or "slice", the first rows of the table, as in training.

        Returns:
            `[B, out_channels, T, h, w]`.

        Raises:
            ValueError: a shape or dtype that the model cannot take.
        """
        self._check(latents, prompt_embeds, timestep, learned_positions)
        config = self.config
        time, rows, columns = config.patch
        frames, height, width = grid = config.grid(*latents.shape[2:])
        learned = config.use_learned_positional_embeddings and (
            config.is_sample_length(latents.shape[2]) or learned_positions == "slice"
        )
        sincos, rope = self._tables(grid, latents, learned)
        x = self._embed(latents, prompt_embeds, sincos)  # [B, N, D]
        if learned:
            x = x + self.pos_embedding[:, : x.shape[1]].to(x.dtype)

        text_len, shard = prompt_embeds.shape[1], Shard(0, x.shape[1], x.shape[1])
        emb = self._embed_time(timestep, latents.dtype)
        temb = F.silu(emb)
        context = BlockContext(temb, rope, text_len, grid, shard, step=step, branch=branch, emb=emb)

        def blocks(x: Tensor, start: int = 0, stop: int | None = None, **told: Any) -> Tensor:
            return self.run_blocks(x, dataclasses.replace(context, **told), start, stop)

        x = blocks(x) if step_cache is None else step_cache.run(x, context, blocks)

        video = self.norm_final(x[:, text_len:])
        shift, scale = self.modulation_out(temb)[:, None].expand(-1, 2, -1).chunk(2, dim=-1)
        video = _norm_modulate(self._ops, self.norm_out, video, shift, scale, text_len=0)
        return rearrange(
            self.proj_out(video),
            "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)",
            t=frames, h=height, w=width, pt=time, ph=rows, pw=columns,
        )  # fmt: skip

    def run_blocks(self, x: Tensor, context: BlockContext, start: int = 0, stop: int | None = None) -> Tensor:
        """Run the blocks start..stop-1 on `[B, N, D]`; all of them by default."""
        for layer in range(len(self.blocks))[start:stop]:
            x = self.blocks[layer](x, context.at(layer))
        return x

    def _embed(self, latents: Tensor, prompt_embeds: Tensor, sincos: Tensor | None) -> Tensor:
        """Embed text and patches into one `[B, N, D]`. sincos: `[S, D]`, added to the video tokens."""
        time, rows, columns = self.config.patch
        patches = rearrange(latents, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=time, ph=rows, pw=columns)
        text, video = self.text_proj(prompt_embeds), self.patch_proj(patches)
        if sincos is not None:
            video = video + sincos
        return torch.cat([text, video], dim=1)

    def _embed_time(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed the timesteps and the constant ofs: `[B, time_embed_dim]`."""
        emb = self.time_embed(timestep, dtype)
        if self.config.ofs_embed_dim is not None:
            emb = emb + self.ofs_embed(timestep.new_full((1,), OFS, dtype=torch.float32), dtype)
        return emb

    def _tables(self, grid: Grid, latents: Tensor, learned: bool) -> tuple[Tensor | None, Rope | None]:
        """Return the sin-cos table to add and the rotary table, keeping them until the grid, dtype or device changes.

        learned: the learned table is added, so the sin-cos one is not.
        """
        config, device = self.config, latents.device
        key = (grid, latents.dtype, device, learned)
        kept = self._kept_tables  # read once: another thread may replace it
        if kept is None or kept[0] != key:
            sincos, rope = None, None
            # Tensors made in inference mode could not be used in training later.
            with torch.inference_mode(False):
                if config.adds_positions and not learned:
                    sincos = self._sincos_table(grid, device).to(latents.dtype)
                if config.use_rotary_positional_embeddings:
                    rope = rotary_table(self._rotary_positions(grid, device), _split_width(config.attention_head_dim))
            self._kept_tables = kept = key, (sincos, rope)
        return kept[1]

    def _rotary_positions(self, grid: Grid, device: torch.device) -> Positions:
        if self.config.patch_size_t is not None:
            return index_positions(grid, device)
        _, base_height, base_width = self.config.trained_grid
        return resize_crop_positions(grid, (base_height, base_width), device)

    def _sincos_table(self, grid: Grid, device: torch.device | None = None) -> Tensor:
        return sincos_table(
            grid,
            _split_width(self.config.hidden_size),
            spatial_scale=self.config.spatial_interpolation_scale,
            temporal_scale=self.config.temporal_interpolation_scale,
            device=device,
        )

    def initial_pos_embedding(self) -> Tensor:
        text_len, grid = self.config.max_text_seq_length, self.config.trained_grid
        table = torch.zeros(1, text_len + math.prod(grid), self.config.hidden_size)
        if not table.is_meta:  # it has no values there, and arithmetic on meta takes seconds to import
            table[0, text_len:] = self._sincos_table(grid)
        return table

    def _check(self, latents: Tensor, prompt_embeds: Tensor, timestep: Tensor, learned_positions: str) -> None:
        config = self.config
        for name, tensor in {"latents": latents, "prompt_embeds": prompt_embeds}.items():
            if tensor.dtype != self.dtype:
                raise ValueError(f"{name}: got {tensor.dtype}, want the model's {self.dtype}")
        if latents.ndim != 5 or latents.shape[1] != config.in_channels:
            raise ValueError(f"latents: got {list(latents.shape)}, want [B, {config.in_channels}, T, h, w]")
        batch, _, frames, height, width = latents.shape
        if any(n == 0 or n % p for n, p in zip((frames, height, width), config.patch, strict=True)):
            raise ValueError(f"latents: got T, h, w = {frames}, {height}, {width}, want multiples of {config.patch}")
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[::2] != (batch, config.text_embed_dim):
            raise ValueError(
                f"prompt_embeds: got {list(prompt_embeds.shape)}, want [{batch}, L, {config.text_embed_dim}]"
            )
        if timestep.shape != (batch,):
            raise ValueError(f"timestep: got shape {list(timestep.shape)}, want [{batch}]")
        if config.adds_positions and prompt_embeds.shape[1] != config.max_text_seq_length:
            raise ValueError(
                f"prompt_embeds: got {prompt_embeds.shape[1]} tokens, want {config.max_text_seq_length}: "
                "this model has positions for exactly as many"
            )
        if learned_positions not in LEARNED_POSITIONS:
            raise ValueError(
                f"learned_positions: got {learned_positions!r}, want one of {', '.join(LEARNED_POSITIONS)}"
            )
        if config.use_learned_positional_embeddings:
            trained_frames, _, _ = config.trained_grid
            if (height, width) != (config.sample_height, config.sample_width):
                raise ValueError(
                    f"latents: got {height}x{width}, want {config.sample_height}x{config.sample_width}: "
                    "the learned positions are for this size alone"
                )
            if learned_positions == "slice" and config.grid(frames, height, width)[0] > trained_frames:
                raise ValueError(
                    f"latents: got {frames} frames, want at most {trained_frames} with learned_positions='slice'"
                )


class Block(nn.Module):
    """One block: attention, then MLP, each between an adaLN and a gated residual; equals `CogVideoXBlock`.

    centred: the weights of `q_proj` and `k_proj` were centred over each head, so that the Q and K norms are RMSNorm.
    """

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.attention_head_dim
        self.ops = ops
        self.num_heads = config.num_attention_heads
        self.centred = False
        # Weights that are loaded are not centred; whoever loads centred ones says so again.
        self.register_load_state_dict_post_hook(lambda block, _: setattr(block, "centred", False))

        self.modulation1 = nn.Linear(config.time_embed_dim, 6 * width)
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(head_dim, eps=config.qk_norm_eps)
        self.k_norm = nn.LayerNorm(head_dim, eps=config.qk_norm_eps)
        self.out = nn.Linear(width, width)

        self.modulation2 = nn.Linear(config.time_embed_dim, 6 * width)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """Return the next `[B, N, D]`."""
        ops, text_len = self.ops, context.text_len

        shift, scale, gate = _modulation(self.modulation1, context.temb)
        y = _norm_modulate(ops, self.norm1, x, shift, scale, text_len=text_len)
        y = context.around_attention(y, context, self._attend)

        shift, scale, mlp_gate = _modulation(self.modulation2, context.temb)
        if can_fuse(norm := self.norm2, nn.LayerNorm):
            x, y = ops.gate_residual_norm_modulate(
                x, y, gate, norm.weight, norm.bias, shift, scale, text_len=text_len, eps=norm.eps
            )
        else:
            x = ops.gate_residual(x, y, gate, text_len=text_len)
            y = modulate(norm(x), shift, scale, text_len=text_len)
        if can_fuse(linear := self.mlp_in, nn.Linear):
            y = ops.linear_gelu(y, linear.weight, linear.bias)
        else:
            y = F.gelu(linear(y), approximate="tanh")
        return ops.gate_residual(x, self.mlp_out(y), mlp_gate, text_len=text_len)

    def _attend(self, x: Tensor, context: BlockContext) -> Tensor:
        """Return what attention makes of the normed tokens, `[B, N, D]`, with the projections before and after it."""
        # Each is a view [B, N, heads, head_dim] of what its linear returned.
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._norm_rotate(q, k, context)
        return self.out(self.ops.attention(q, k, v, context))

    def _norm_rotate(self, q: Tensor, k: Tensor, context: BlockContext) -> tuple[Tensor, Tensor]:
        q_norm, k_norm = self.q_norm, self.k_norm
        if can_fuse(q_norm, nn.LayerNorm) and can_fuse(k_norm, nn.LayerNorm):
            # Only a plain linear is known to give centred heads; an adapter's part of the sum is not centred.
            centred = self.centred and can_fuse(self.q_proj, nn.Linear) and can_fuse(self.k_proj, nn.Linear)
            return self.ops.qk_norm_rope(
                q, k, q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias, context.rope,
                text_len=context.text_len, eps=q_norm.eps, centred=centred,
            )  # fmt: skip
        rope, text_len = context.rope, context.text_len
        return rotate(q_norm(q), rope, text_len=text_len), rotate(k_norm(k), rope, text_len=text_len)


class SinusoidMLP(nn.Module):
    """Embed a number per sample: sinusoids, then an MLP; equals `Timesteps` and `TimestepEmbedding`."""

    def __init__(self, num_sinusoids: int, width: int) -> None:
        super().__init__()
        self.num_sinusoids = num_sinusoids
        self.linear_in = nn.Linear(num_sinusoids, width)
        self.linear_out = nn.Linear(width, width)

    def forward(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `[B, width]` of `value` `[B]`; the sinusoids are fp32 and enter the MLP as `dtype`."""
        half = self.num_sinusoids // 2
        # Multiply, then divide: another order rounds the exponent otherwise, which at 999 changes an angle by 1e-4.
        exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=value.device) / half
        angle = value[:, None].float() * exponent.exp()
        sinusoids = torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)
        return self.linear_out(F.silu(self.linear_in(sinusoids)))


def _modulation(linear: nn.Linear, temb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return shift, scale and gate, each `[B, 2, D]`, text first; in the checkpoints video is first."""
    shift, scale, gate = linear(temb).unflatten(-1, (2, 3, -1)).flip(1).unbind(2)
    return shift, scale, gate


def _norm_modulate(ops: Ops, norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor, *, text_len: int) -> Tensor:
    if can_fuse(norm, nn.LayerNorm):
        return ops.layer_norm_modulate(x, norm.weight, norm.bias, shift, scale, text_len=text_len, eps=norm.eps)
    return modulate(norm(x), shift, scale, text_len=text_len)


def _split_width(width: int) -> tuple[int, int, int]:
    time, rows, columns = (share * width // sum(HEAD_DIM_SPLIT) for share in HEAD_DIM_SPLIT)
    return time, rows, columns
