"""Offline calibration: model + text -> statistics -> plan -> codec -> artifact; `calibration.pipeline` runs the steps.

Imports point one way: this package uses `vllm_kvsplice.{artifact, codec, huggingface, layout, names, rotary}`, and never
vLLM or Triton.
"""
