"""KVSplice: a vLLM attention backend that keeps the KV cache in a calibrated transform code.

Tensor names carry their dimensions where a reader would wonder, in this key:

    T tokens of a step      S sequences             L layers               D head dimensions
    H KV heads              G query heads per KV    R latents of a head    page = bytes [C per token, N tokens]

Words (docs/codec.md): latent, width (bits of a group of 8 latents), plan (all widths), page (one block of one layer), slot
(one token in a page), sink (position 0), residual (what is coded), engine (a kernel implementation), artifact (what
calibration exports).
"""

__version__ = "0.1.0"


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM calls it in every process, sometimes more than once."""
    from vllm_kvsplice.serving.registration import register as register_plugin

    register_plugin()
