"""Inside vLLM: plugin (registration and refusals) -> settings (artifact) -> backend (cache spec, metadata, attention)."""
