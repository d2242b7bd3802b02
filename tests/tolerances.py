"""Every tolerance of the test suite: one line of reason and the largest measured value beside each.

`rel rms` is `measure.rel_rms`, `pooled` is `measure.pooled_ratio`. fp32 on a CPU unless said otherwise; the
largest measured is that of all rows of scripts/test_matrix.sh on an AMD EPYC with AVX-512.
"""

# Sampler and text
SAMPLER_FP32 = 5e-7  # rel rms of every state against the diffusers schedulers; a few ulps (measured 0.0, the same bits)
SAMPLER_LOW_PRECISION = 0.5  # pooled errors against fp64, ours over diffusers': our state stays fp32 (measured 0.42)
ADD_NOISE_FP32 = 6e-7  # rel rms; diffusers takes 1 - alpha in fp32, which loses digits near t = 0 (measured 1.8e-7)
TEXT_FP32 = 5e-7  # rel rms of prompt embeddings against diffusers; room for another order of sums (measured 0.0)
LOW_PRECISION_TEXT = 1.05  # pooled errors against fp64, ours over diffusers'; the norm rounds once here (measured 0.87)

# Pipelines
PIPELINE_LATENTS = 4e-6  # rel rms of the final latents; rounding through whole runs (measured 1.6e-6)
COMPAT_LATENTS = 1e-5  # rel rms of the latents of 3 steps with guidance 6, which amplifies rounding (measured 3.1e-6)
STEP_CACHE_LATENTS = 4e-6  # rel rms of the latents with a step cache, as without (measured 5.9e-7)
FRAMES_FP32 = 2e-6  # rel rms of frames in [0, 1] against diffusers; rounding through run and decoding (measured 3.9e-7)
FRAMES_MAX_ABS = 1e-5  # the largest error of one value of them (measured 2.8e-6); 0.0026 of a level of uint8

# Random configurations
FUZZ_FP32 = 5e-6  # rel rms of every output against diffusers; models of any shape, some badly scaled (measured 4.7e-6)
FUZZ_CHAOS = 8.0  # beyond it: our error over what an ulp in diffusers' weights makes of its own output (measured 4.4)

# Operations
OP_FP32 = 6e-7  # rel rms against the formula in fp64; a few ulps (measured 1.4e-7)
OP_LOW_PRECISION = 1.01  # our error over that of rounding the exact result: fp32 inside shifts 1 in 1000 (measured 1.0)
SPATIAL_NORM_FP32 = 5e-7  # rel rms; the convolution sums at another resolution (measured 9.8e-8)

# Transformer
TRANSFORMER_FP32 = 1e-6  # rel rms of the output; norms and rotation round elsewhere (measured 3.3e-7)
TRANSFORMER_FP64 = 2e-8  # rel rms in fp64; diffusers rotates in fp32 (measured 4.5e-9)
TRANSFORMER_BF16 = 1.0  # pooled errors against fp64, ours over diffusers'; we round less often (measured 0.88)
TRANSFORMER_GRADIENTS_FP32 = 1e-5  # rel rms of each gradient; small ones cancel (measured 3.4e-6)
EMBED_FP32 = 1e-6  # rel rms; a convolution as a matrix (measured 2.0e-7)
BLOCK_FP32 = 1e-6  # rel rms of one block; as for the whole model (measured 1.9e-7)
UNFUSED_FP32 = 1e-6  # rel rms; modules called one by one, or parts of a sequence, round elsewhere (measured 2.8e-7)
QK_NORM_RMS_FP32 = 4e-6  # rel rms of runs with qk_norm="rms"; its weights are rounded once more (measured 7.8e-7)
QK_NORM_RMS_BF16 = 1.1  # pooled errors against fp64, over those of "layer"; weights rounded once more (measured 1.006)
BATCH_FP32 = 1e-6  # rel rms; matrix products block other batches otherwise (measured 2.9e-7)
SPLIT_FP32 = 2e-6  # rel rms on several processes against one; BLAS orders sums by size, a ring merges (measured 0.0)
SPLIT_BF16 = 1.5  # pooled errors against fp32, several processes over one; the ring rounds its parts (measured 0.0)

# Kernels
ATTENTION_FP32 = 1e-6  # rel rms of output and log-sum-exp against fp64; order of sums, exp2 (measured 4.7e-7)
ATTENTION_LOW_PRECISION = 2.0  # error against fp64 over that of PyTorch's own op in that dtype (measured 1.22)
ATTENTION_FP64 = 5e-15  # rel rms of exact rewrites carried out in fp64; rounding of fp64 (measured 8.2e-16)
QK_NORM_FP64 = 2e-15  # rel rms of RMSNorm of centred rows against LayerNorm; rounding of fp64 (measured 1.1e-16)
KERNEL_FP32 = 1e-6  # rel rms of the other kernels against fp64; order of sums, rsqrt (measured 1.5e-7)
KERNEL_LOW_PRECISION = 2.0  # their error against fp64 over that of PyTorch's own op in that dtype (measured 1.0002)
PIPELINE_TRITON_FRAMES = 3e-6  # rel rms of frames with kernels and without; rounding through it all (measured 6.5e-7)

# Shipped packs
PACK_LATENTS = 5e-6  # rel rms of the latents after 8 steps against diffusers (measured 1.8e-6)
PACK_FRAMES_FP32 = (
    3e-6  # rel rms of their frames; an ulp in diffusers' weights moves its own by 1.3e-6 (measured 1.1e-6)
)
PACK_FRAMES_MAX_ABS = 3e-5  # of one value; such an ulp moves diffusers' own by up to 1.5e-5 (measured 9.5e-6)
PIPELINE_BATCH = 4e-6  # rel rms of pixels of a batch and of its parts; BLAS orders sums by size (measured 8.5e-7)

# VAE
VAE_FP32 = 5e-6  # rel rms of whole encodes and decodes; sums in another order through 20 layers (measured 2.3e-6)
VAE_FP64 = 1e-14  # rel rms in fp64: the rewrites are exact algebra (measured 1.8e-15)
VAE_STAGE_FP32 = 1e-6  # rel rms of one stage; norm statistics summed in another order (measured 5.9e-7)
VAE_BF16 = 1.05  # pooled errors against fp64, ours over diffusers'; norms round once here (measured 0.89)
VAE_GRADIENTS_FP32 = 2e-5  # rel rms of each gradient, encode and decode in one; small ones cancel (measured 7.4e-6)
VAE_BATCH_FP32 = 3e-6  # rel rms; convolutions block other batches otherwise (measured 1.1e-6)
COMPILED_RMS_FP32 = 3e-6  # rel rms of fp32 results through torch.compile: the order of sums, and the form of the norms

# Adapters
LORA_FP32 = 2e-6  # rel rms of the output against diffusers and peft, fused or not; other roundings (measured 5.3e-7)
LORA_BF16 = 1.0  # pooled errors against fp64, ours over diffusers'; the model rounds less often (measured 0.90)
