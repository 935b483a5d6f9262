"""The model card (README.md) that an artifact has on the Hugging Face Hub: what it is, what it costs, how to use it."""

from vllm_kvsplice.artifact import Artifact, Quality

TAGS = ("kvsplice", "kv-cache", "kv-cache-compression", "vllm")


def model_card(artifact: Artifact, repository: str) -> str:
    """Markdown with YAML metadata; `repository` is the name on the Hub that its commands should name."""
    origin = artifact.manifest.provenance
    sections = [
        _metadata(artifact),
        f"# KV-cache codec for {origin.model}",
        "An artifact of KVSplice: it holds no weights, but the transforms and codebooks that compress the KV cache of "
        f"{origin.model} to {artifact.bits_per_element:.2f} bits per element.",
        _sizes(artifact),
        _use(origin.model, repository),
        "## Where it comes from",
        _provenance(artifact),
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(artifact: Artifact) -> str:
    from huggingface_hub import ModelCardData

    model = artifact.manifest.provenance.model
    # A directory on the machine that calibrated is no name on the Hub.
    base = model if model.count("/") == 1 else None
    data = ModelCardData(base_model=base, library_name="vllm", pipeline_tag="text-generation", tags=list(TAGS))
    return f"---\n{data.to_yaml()}\n---"


def _sizes(artifact: Artifact) -> str:
    before, after = artifact.baseline_bytes_per_token, artifact.bytes_per_token
    rows = [
        "| | 16 bits | KVSplice |",
        "| --- | --- | --- |",
        f"| bits per element | 16 | {artifact.bits_per_element:.2f} |",
        f"| bytes per token | {before} | {after} ({before / after:.2f}x smaller) |",
        f"| layers compressed | | {len(artifact.compressed_layers)} of {artifact.manifest.model.num_layers} |",
    ]
    quality = artifact.manifest.quality
    if quality:
        rows.append(
            f"| perplexity | {quality.baseline_ppl:.3f} | {quality.ppl:.3f} ({quality.change_percent:+.2f} %) |"
        )
    return "\n".join(rows) + f"\n\n{_measured(quality)}"


def _measured(quality: Quality | None) -> str:
    if not quality:
        return "Its quality was not measured."
    return (
        f"Perplexity is of {quality.tokens} tokens that were not calibrated on, in windows of {quality.context}, with "
        "every attended key and value compressed. With an exact window, as by default, less is lost."
    )


def _use(model: str, repository: str) -> str:
    return f"""## How to use it

```console
kvsplice serve {model} {repository}
kvsplice eval {model} {repository} --text your-text.txt --recent 32
```

```python
from transformers import AutoModelForCausalLM
from vllm_kvsplice.huggingface import CompressedKVModelWrapper

model = CompressedKVModelWrapper(AutoModelForCausalLM.from_pretrained("{model}"), "{repository}")
```

It fits the configuration of {model} and is refused with any other; fine-tuned weights need an artifact of their own."""


def _provenance(artifact: Artifact) -> str:
    origin = artifact.manifest.provenance
    rows = {
        "model": origin.model,
        "text": f"{origin.text}, {origin.tokens} tokens in windows of {origin.context}, seed {origin.seed}",
        "SHA-256 of the text": origin.text_sha256,
        "exact window": origin.recent,
        "fit": origin.fit,
        "plan": f"{origin.planner}, {origin.requested}",
        "created": origin.created,
        "made with": ", ".join(f"{name} {version}" for name, version in origin.versions.items()),
        "digest": artifact.digest,
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
