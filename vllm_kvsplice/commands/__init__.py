"""Commands of `kvsplice`, the options that several have, and how they print; `vllm_kvsplice.cli` puts them together."""
