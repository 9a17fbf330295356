"""The command ``solve``: every knob of every method is an option, and those of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.guard import STORE, Json, Store, command_line, guarded, leads
from cli.options import (
    Accumulator,
    ClassInit,
    Loss,
    Place,
    Preset,
    Score,
    TrainingPrecision,
    WeightInit,
)

_PANEL = "CosFace"


@guarded
def solve(
    method: Annotated[
        str,
        typer.Option(
            help="svd, gnull, plda, cca, regression, procrustes, kissme, cosface; without pairs: analytic; "
            "or a control: identity, centred, pca, norm-weighted. auto tries all on validation."
        ),
    ] = "svd",
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="R|all",
            help="Columns of W; all: every direction that the method finds (not svd, gnull, cosface). "
            "auto: at most so many.",
            show_default="512, or fewer where the latents have fewer",
        ),
    ] = None,
    store: Store = STORE,
    out: Annotated[
        Path | None, typer.Option(help="Where W goes.", show_default="W-METHOD-RANK.safetensors")
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(help="A store of queries to choose and measure on.", show_default="the store itself"),
    ] = None,
    lam: Annotated[
        float | None,
        typer.Option(help="Ridge λ of methods that have one.", show_default="chosen on validation"),
    ] = None,
    score: Annotated[
        Score | None,
        typer.Option(help="cosine, or the Bayes score (bias).", show_default="chosen on validation"),
    ] = None,
    alpha_bar: Annotated[
        str | None,
        typer.Option(
            metavar="A[,A...]",
            help="analytic: noise level that is assumed; --simulate: those that are drawn.",
            show_default="0.1; 0.02 to 0.7",
        ),
    ] = None,
    prompt_strength: Annotated[
        float | None,
        typer.Option(help="analytic, --simulate: how far prompts move the mean.", show_default="0; 0.3"),
    ] = None,
    latent_shape: Annotated[
        str | None,
        typer.Option(
            metavar="store|C,H,W",
            help="analytic, plda, cca, regression: covariances that are the same everywhere in the picture, "
            "for few images; store takes the encoder's shape.",
            show_default="none",
        ),
    ] = None,
    exponent: Annotated[
        float | None, typer.Option(help="pca: of the whitening.", show_default="0.25")
    ] = None,
    accumulator: Annotated[
        Accumulator | None, typer.Option(help="svd: what T is factored by.", show_default="auto")
    ] = None,
    simulated: Annotated[
        bool,
        typer.Option(
            "--simulate", help="Fit on simulated translations of the training images: no pairs needed."
        ),
    ] = False,
    with_cosface: Annotated[
        bool, typer.Option("--with-cosface", help="auto: try cosface, too (--budget seconds).")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(help="cosface, --simulate: of all that is drawn.", show_default="0", min=0),
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(
            help="The recipe: sized to the store, or the paper's. What follows overrides it.",
            show_default="auto",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Seconds that training may take.",
            show_default="auto: 40, unless --steps is named; paper: no limit",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of Adam.", rich_help_panel=_PANEL)] = None,
    batch_identities: Annotated[
        int | None, typer.Option(help="Identities of a batch.", rich_help_panel=_PANEL)
    ] = None,
    per_identity: Annotated[
        int | None, typer.Option(help="Rows of each identity in a batch.", rich_help_panel=_PANEL)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=_PANEL)] = None,
    relative_lr: Annotated[
        bool | None,
        typer.Option(
            "--relative-lr/--absolute-lr",
            help="In units of the entries' first size, or as it is.",
            show_default="auto: relative; paper: absolute",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(help="Share of the steps at which the rate's rise ends.", rich_help_panel=_PANEL),
    ] = None,
    warmup_from: Annotated[
        float | None,
        typer.Option(
            help="Share of the rate at which its rise begins.", show_default="0.01", rich_help_panel=_PANEL
        ),
    ] = None,
    flat: Annotated[
        float | None,
        typer.Option(help="Share of the steps at which its cosine decay begins.", rich_help_panel=_PANEL),
    ] = None,
    schedule_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between changes of the rate.",
            show_default="auto: 1; paper: a 25th of the steps",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    loss: Annotated[
        Loss | None,
        typer.Option(help="What is minimised.", show_default="cosface", rich_help_panel=_PANEL),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(help="s of the loss.", show_default="64, or the loss's own", rich_help_panel=_PANEL),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(help="m of the loss.", show_default="0.35, or the loss's own", rich_help_panel=_PANEL),
    ] = None,
    ema: Annotated[
        bool | None,
        typer.Option(
            "--ema/--no-ema", help="Average W over the steps.", show_default="yes", rich_help_panel=_PANEL
        ),
    ] = None,
    ema_decay: Annotated[
        float | None,
        typer.Option(
            help="Largest share of the average that a step keeps.",
            show_default="0.9999",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    weight_init: Annotated[
        WeightInit | None,
        typer.Option(
            help="Where W starts; auto takes the better one on validation.",
            show_default="auto: auto; paper: random",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    class_init: Annotated[
        ClassInit | None,
        typer.Option(
            help="Where class weights start.",
            show_default="auto, --init: means; paper: random",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="Start W at this map's leading columns, from any solve.", rich_help_panel=_PANEL),
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="Steps between validations.", rich_help_panel=_PANEL)
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many validations without a better mAP.",
            show_default="auto: 6, unless --steps is named; paper: never",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    precision: Annotated[
        TrainingPrecision | None,
        typer.Option(help="Of the products.", show_default="fp32", rich_help_panel=_PANEL),
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(
            help="Take a batch in so many parts, for its memory.", show_default="1", rich_help_panel=_PANEL
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda or cuda:N.", show_default="auto", rich_help_panel=_PANEL),
    ] = None,
    latents: Annotated[
        Place | None,
        typer.Option(
            help="Where the latents lie.", show_default="the fastest that they fit", rich_help_panel=_PANEL
        ),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines, one a validation.",
            show_default="beside W: W-....log.jsonl",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="PNG of loss, validation and cosines over the steps.", rich_help_panel=_PANEL),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew where a checkpoint lies.", rich_help_panel=_PANEL)
    ] = False,
    checkpoint_every: Annotated[
        float | None,
        typer.Option(help="Seconds between checkpoints.", show_default="60", min=0, rich_help_panel=_PANEL),
    ] = None,
    json_: Json = False,
) -> None:
    """Fit W, write it, and report how it does on held-out queries beside its controls.

    Knobs that are left open (--lam, --score) are chosen on validation queries, where there are any.

    Example: solve --method svd --rank 512 --store simulated.zarr

    Example: solve --method auto --store simulated.zarr

    Example: solve --method cosface --store simulated.zarr --plot training.png

    A training run that is stopped or killed goes on with the same command, from its checkpoint beside W.
    """
    from cli import knobs, render, solving
    from cli.progress import passes
    from cli.training import Run
    from solvers.methods import get

    knobs.check_name(method)
    knobs.check_run(
        method,
        {
            "init": init,
            "latents": latents,
            "log": log,
            "plot": plot,
            "fresh": fresh,
            "checkpoint_every": checkpoint_every,
        },
    )
    options = knobs.SolveOptions.of(
        method,
        None if rank is None else knobs.parse_rank(rank),
        simulate=simulated,
        with_cosface=with_cosface,
        lam=lam,
        score=score and score.value,
        alpha_bar=None if alpha_bar is None else knobs.parse_levels(alpha_bar),
        prompt=prompt_strength,
        latent_shape=None if latent_shape is None else knobs.parse_shape(latent_shape),
        exponent=exponent,
        accumulator=accumulator and accumulator.value,
        preset=preset and preset.value,
        budget=budget,
        seed=seed,
        steps=steps,
        batch_identities=batch_identities,
        per_identity=per_identity,
        lr=lr,
        relative_lr=relative_lr,
        warmup=warmup,
        warmup_from=warmup_from,
        flat=flat,
        schedule_every=schedule_every,
        loss=loss and loss.value,
        scale=scale,
        margin=margin,
        ema=ema,
        ema_decay=ema_decay,
        weight_init=weight_init and weight_init.value,
        class_init=class_init and class_init.value,
        validate_every=validate_every,
        patience=patience,
        precision=precision and precision.value,
        accumulate=accumulate,
        device=device,
    )
    run = Run(
        init=init,
        latents=latents and latents.value,
        log=log,
        plot=plot,
        fresh=fresh,
        checkpoint_every=Run.checkpoint_every if checkpoint_every is None else checkpoint_every,
    )
    # The lines of auto and a bar would write over each other.
    silent = json_ or method == knobs.AUTO or not leads()
    trained = method != knobs.AUTO and get(method).needs_torch
    with (
        render.steps(method, quiet=silent or not trained) as progress,
        passes(method, quiet=silent or trained) as on_pass,
    ):
        solved = solving.solve(
            store,
            out,
            options,
            queries=queries,
            progress=progress,
            say=(lambda text: None) if json_ else render.note,
            command=command_line(),
            run=run,
            on_pass=on_pass,
        )
    if solved is not None:
        render.emit(solved.report.to_dict()) if json_ else render.say(render.solved(solved, solved.out))
