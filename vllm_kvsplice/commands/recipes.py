"""`kvsplice calibrate` and `kvsplice plan`: what a recipe leads to."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from vllm_kvsplice.commands import options
from vllm_kvsplice.commands.printing import console, print_plan, print_summary

if TYPE_CHECKING:
    from calibration.recipe import CalibrationConfig


def calibrate(
    model: options.Model,
    out: Annotated[
        Path,
        typer.Option(help="Directory of the artifact; an artifact there is replaced.", callback=options.output),
    ],
    text: options.Text = None,
    tokens: options.Tokens = None,
    bits: options.Bits = None,
    budget: options.Budget = None,
    max_ppl_increase: options.MaxIncrease = None,
    planner: options.Plans = None,
    plan: options.PlanJson = None,
    fim: options.Fim = None,
    fit: options.Fits = None,
    finetune: options.Finetune = None,
    steps: options.Steps = None,
    config: options.Recipe = None,
    context: options.Context = None,
    seed: options.Seed = None,
    recent: options.Recent = None,
    statistics: options.Statistics = None,
    errors: options.Errors = None,
) -> None:
    """Measure a model, decide where its bits go, fit the codec, judge it, and write the artifact.

    Examples:

    `kvsplice calibrate HuggingFaceTB/SmolLM2-1.7B-Instruct --out smollm2-4bit --text wikitext`

    `kvsplice calibrate ./my-model --out ./my-model/kvsplice --text my-domain.txt --max-ppl-increase 1%`

    `kvsplice calibrate ./my-model --out ./my-model/kvsplice --plan configs/manual_gpt2.json`
    """
    from calibration.pipeline import calibrate as run
    from vllm_kvsplice.artifact import check_target

    sizes = {"bits": bits, "budget": budget, "max_ppl_increase": max_ppl_increase}
    training = {"fit": fit, "finetune": finetune, "steps": steps}
    measuring = {"text": text, "tokens": tokens, "context": context, "seed": seed, "recent": recent}
    recipe = _recipe(config, planner, plan, fim, **measuring, **sizes, **training)
    check_target(out)
    artifact = run(model, out, recipe, statistics, errors)
    print_summary(artifact, f"Wrote {out}")
    console.print(f"Serve it with: kvsplice serve {model} {out}", soft_wrap=True)


def plan(
    model: options.Model,
    out: Annotated[
        Optional[Path],
        typer.Option(help="Write the plan here, as JSON for calibrate --plan.", callback=options.output_file),
    ] = None,
    text: options.Text = None,
    tokens: options.Tokens = None,
    bits: options.Bits = None,
    budget: options.Budget = None,
    max_ppl_increase: options.MaxIncrease = None,
    planner: options.Plans = None,
    plan: options.PlanJson = None,
    fim: options.Fim = None,
    config: options.Recipe = None,
    context: options.Context = None,
    seed: options.Seed = None,
    recent: options.Recent = None,
    statistics: options.Statistics = None,
) -> None:
    """Measure a model and say where its bits would go and why, what that saves and what it is expected to cost.

    Examples:

    `kvsplice plan ./my-model --bits 3 --statistics measured.safetensors --out plan.json`

    `kvsplice plan ./my-model --planner tiers --statistics measured.safetensors`
    """
    from calibration.pipeline import plan as run

    sizes = {"bits": bits, "budget": budget, "max_ppl_increase": max_ppl_increase}
    measuring = {"text": text, "tokens": tokens, "context": context, "seed": seed, "recent": recent}
    recipe = _recipe(config, planner, plan, fim, **measuring, **sizes)
    planned = run(model, recipe, statistics)
    print_plan(planned)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(planned.model_dump_json(indent=1) + "\n")
        console.print(f"Wrote {out}; use it with: kvsplice calibrate {model} --plan {out} --out DIR", soft_wrap=True)


def _recipe(
    config: Path | None, planner: options.PlannerName | None, plan: Path | None, fim: Path | None, **settings: Any
) -> "CalibrationConfig":
    from calibration.recipe import read_config

    return read_config(config, planner=planner or ("manual" if plan else None), plan=plan, fim=fim, **settings)
