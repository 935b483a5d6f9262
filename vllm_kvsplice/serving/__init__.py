"""Inside vLLM: registration -> plugin (refusals) -> settings (artifact) -> backend (cache spec, metadata, attention)."""
