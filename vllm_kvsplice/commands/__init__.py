"""Commands of `kvsplice` that share options, and how they print; `vllm_kvsplice.cli` puts them together."""
