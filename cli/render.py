"""What a person sees in the terminal: tables, plain sentences; and JSON for machines."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from cli.progress import progress as progress
from cli.progress import shares
from cli.progress import steps as steps

if TYPE_CHECKING:
    from pathlib import Path

    from cli.demo import DemoResult
    from cli.duplicates import NearDuplicates
    from cli.solving import Solved
    from cli.takedown import Chosen
    from latentstore.encode import EncodeSummary
    from latentstore.removal import Removal
    from latentstore.results import Figure, Report
    from latentstore.verify import Verification


def say(text: str = "") -> None:
    """Print to standard output; control characters (of a hostile file name, say) are spelled out."""
    sys.stdout.write("\n".join(printable(line) for line in text.split("\n")) + "\n")


def note(text: str) -> None:
    """Print to standard error."""
    sys.stderr.write("\n".join(printable(line) for line in text.split("\n")) + "\n")
    sys.stderr.flush()


def confirm(question: str) -> None:
    """Ask on standard error alone: standard output may go to a file. Anything but yes ends the command.

    Raises
    ------
    UsageError
        Standard input is no terminal: nobody can answer.
    """
    import typer

    from latentstore.errors import UsageError

    if not sys.stdin.isatty():
        raise UsageError("There is no terminal to ask in, and nothing was done: give --yes.")
    sys.stderr.write(f"{question} [y/N]: ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise typer.Abort


def emit(value: Any) -> None:
    """Print one JSON value to standard output."""
    say(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def table(header: list[str], rows: Iterable[list[str]], *, left: int = 1) -> str:
    """Return a plain aligned table; the first ``left`` columns are aligned to the left."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return _aligned(lines, widths, left)


def folded(header: list[str], rows: list[list[str]]) -> str:
    """Return a table as wide as the terminal (120 columns in a pipe) at most, its columns in several blocks.

    The first column leads every block; a row that has nothing in a block is left out of it.
    """
    room = shutil.get_terminal_size((120, 24)).columns
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    blocks: list[list[int]] = []
    for i in range(1, len(header)):
        if not blocks or 2 + widths[0] + sum(widths[j] + 2 for j in (*blocks[-1], i)) > room:
            blocks.append([])
        blocks[-1].append(i)
    out = []
    for block in blocks:
        shown = [line for line in rows if any(line[i] for i in block)]
        lines = [[line[0], *(line[i] for i in block)] for line in (header, *shown)]
        out.append(_aligned(lines, [widths[0], *(widths[i] for i in block)], 1))
    return "\n\n".join(out)


def _aligned(lines: list[list[str]], widths: list[int], left: int) -> str:
    out = []
    for number, line in enumerate(lines):
        cells = [
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  " + "  ".join(cells).rstrip())
        if number == 0:
            out.append("  " + "  ".join("-" * w for w in widths))
    return "\n".join(out)


def percent(value: float, interval: tuple[float, float] | None = None) -> str:
    """Return a fraction as a percentage, with its interval."""
    text = f"{100 * value:.1f}" if value >= 0.001 or value == 0 else f"{100 * value:.2g}"
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def figures_table(figures: list[Figure], group: str) -> str:
    """Return mAP and Acc of every subject on one group, methods first."""
    here = [f for f in figures if f.group == group and f.name in ("mAP", "Acc")]
    order = {"method": 0, "control": 1, "chance": 2, "note": 3}
    subjects = sorted({(order[f.role], f.subject) for f in here}, key=lambda s: (s[0], _control_order(s[1])))
    rows = []
    for _, subject in subjects:
        found = {f.name: f for f in here if f.subject == subject}
        rows.append([subject, *(percent(found[n].value, found[n].interval) for n in ("mAP", "Acc"))])
    n = next((f.n for f in here if f.n), 0)
    title = f"  {group}: {counted(n or 0, 'query', 'queries')}; % [95 % interval]"
    return title + "\n" + table(["", "mAP", "Acc"], rows)


def _control_order(subject: str) -> tuple[int, str]:
    first = ("raw", "centred")
    return (first.index(subject), "") if subject in first else (2 + (subject == "random subspace"), subject)


def printable(text: str) -> str:
    """Return text that cannot move the cursor or break a line: control characters are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_HINTS = {
    "link_outside": "--follow-links accepts links that lead out of the folder",
    "too_large": "--max-pixels N decodes larger images",
    "killed": "decoding them ended the process; after a repair of the files, --retry-bad reads them again",
    "changed": "the files are not those that the first array was made of; encode that with --retry-changed",
}
"""What can be done about rows of a status."""


def none_usable(summary: EncodeSummary) -> bool:
    """Tell whether there are images, and all of those that were not removed are bad."""
    return not summary.counts.get("ok") and bool(summary.counts.keys() - {"removed"})


def encode_summary(summary: EncodeSummary, relative_to: Path | None = None) -> str:
    """Return what an encode run did, in a few lines; a manifest's paths were ``relative_to`` a folder."""
    total = summary.seconds.get("total", 0.0)
    rate = f", {summary.encoded / total:,.0f} images/s" if summary.encoded and total > 0 else ""
    kept = summary.rows - summary.encoded
    lines = [f"{summary.store}: {summary.rows:,} rows"]
    if summary.encoded:
        where = "" if summary.ran_on == "this process" else f" on {summary.ran_on}"
        lines.append(f"  encoded {summary.encoded:,} now in {total:.1f} s{rate}{where}")
        lines.append(f"  its time: {shares(summary.seconds)}")
    if kept:
        lines.append(f"  {kept:,} were there already")
    if summary.appended:
        lines.append(f"  {summary.appended:,} new files were appended behind the others")
    bad = {k: v for k, v in summary.counts.items() if k != "ok"}
    lines.append(f"  {summary.counts.get('ok', 0):,} ok" + "".join(f", {v:,} {k}" for k, v in bad.items()))
    hints = dict(_HINTS)
    if relative_to is not None:
        hints["missing"] = f"paths were taken as relative to {relative_to}; FOLDER in encode FOLDER decides"
    lines += [f"    {status}: {hint}" for status, hint in hints.items() if status in bad]
    lines += [f"  Warning: {w}; rows encoded now may differ in their last bits" for w in summary.warnings]
    lines += [f"  Note: {note}" for note in summary.notes]
    lines += _changed_files(summary)
    lines += [f"    {printable(path)}: {status}: {reason}" for path, status, reason in summary.bad]
    more = sum(bad.values()) - len(summary.bad)
    if summary.bad and more > 0:
        lines.append(f"    and {more:,} more; all are in the manifest")
    if none_usable(summary):
        lines.append("  None of the images can be used: the store holds no latent.")
    return "\n".join(lines)


def _changed_files(summary: EncodeSummary) -> list[str]:
    """Return the warning about files of committed rows that are not as they were read."""
    if not summary.changed:
        return []
    counts = ", ".join(f"{n:,} {what}" for what, n in summary.changed.items())
    named = ", ".join(printable(path) for path, _ in summary.changed_first)
    text = f"  Warning: committed files are not as they were read: {counts} ({named}). Their rows are kept."
    if summary.changed.keys() - {"missing"}:
        text += (
            f" latentstore verify {summary.store} --check-sources tells which hold something else; "
            "encode --retry-changed makes the shards of those anew."
        )
    return [text]


def plain(value: Any) -> Any:
    """Return a dataclass as plain JSON types."""
    import dataclasses

    return dataclasses.asdict(value)


def solved(result: Solved, path: Path) -> str:
    """Return what a solve found, in the terminal; T is told of where W learned from it."""
    from solvers.methods import get

    facts, lines = result.facts, [f"{result.report.title}: {path}"]
    rank = facts.get("numerical_rank")
    if rank is not None and get(result.projection.method).needs_pairs:
        pairs = counted(facts["n_pairs"], "training pair")
        lines.append(
            f"  T: {pairs}, numerical rank {rank} of {result.projection.dim} "
            f"(decided by {facts['decided_by']}: zero is below {facts['cutoff']:.3g}); singular values from "
            f"{facts['sigma_max']:.4g} down to {facts['sigma_min']:.3g}"
        )
    if facts.get("statement"):
        lines.append(f"  {facts['statement']}")
    if facts["chosen"]:
        lines.append(f"  {facts['chosen']}")
    knobs = {k: v for k, v in result.projection.knobs.items() if k != "rank" and v is not None}
    if knobs:
        lines.append("  knobs: " + ", ".join(f"{k.replace('_', '-')} {_value(v)}" for k, v in knobs.items()))
    residual = {f.subject: f for f in result.report.figures if f.name == "held-out residual"}
    if residual:
        own, random = (residual[s].value for s in (result.projection.method, "random subspace"))
        n = counted(residual["random subspace"].n or 0, "test pair")
        lines.append(f"  held-out ‖TW‖/‖(O−μ)W‖ = {own:.3f} on {n}; a random subspace: {random:.3f}")
    if facts["choices"] and result.report.settings["method"] == "auto":
        from cli.render_auto import tried

        lines += ["", tried(facts["choices"])]
    return "\n".join([*lines, *_measured(result.report, above=(facts["chosen"], facts.get("statement")))])


def _value(value: Any) -> str:
    """Return a knob's value in a few characters."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _measured(report: Report, above: tuple[str | None, ...] = ()) -> list[str]:
    """Return the figures of every group, then what is to be said of them and was not said above."""
    groups = list(dict.fromkeys(f.group for f in report.figures if f.name == "mAP"))
    out = []
    for group in groups:
        out += ["", figures_table(report.figures, group)]
    return [
        *out,
        "",
        *(s for s in report.summary if s not in above),
        *(f"Note: {c}" for c in report.caveats),
    ]


def near_duplicates(found: NearDuplicates) -> str:
    """Return the groups of near-duplicates, in the terminal: the first ten, and how they were told."""
    facts, shown = found.settings, 10
    largest = max(map(len, found.groups), default=0)
    among = f"{found.rows:,} of {facts['rows compared']:,} images in them, the largest of {largest:,}"
    lines = [
        f"{found.store}: {len(found.groups):,} groups of near-duplicates, {among}",
        f"  score: {facts['score']} ({facts['directions']} directions); compared: {facts['search']}",
        f"  threshold {facts['threshold']:.3f}, set by {facts['set by']}{_expectation(facts)}",
    ]
    if "candidates sampled" in facts:
        lines.append(
            f"  of {facts['candidates sampled']:,} candidates among all pairs of 1,000 images, the search "
            f"found {facts['candidates found']:,}"
        )
    if facts["pairs between groups"]:
        lines.append(
            f"  {facts['pairs between groups']:,} of {facts['pairs']:,} pairs lie between two groups: a "
            "chain of small steps is not made one origin, but is kept from leaking between splits"
        )
    for number, group in enumerate(found.groups[:shown], start=1):
        lines.append(f"\n  group {number}: {len(group)} images")
        lines += [f"    {score:.3f}  {printable(path)}" for path, score in group[:shown]]
        if len(group) > shown:
            lines.append(f"    and {len(group) - shown:,} more")
    if len(found.groups) > shown:
        lines.append(f"\n  and {len(found.groups) - shown:,} groups more; --json lists all")
    return "\n".join(lines)


def _expectation(facts: dict[str, Any]) -> str:
    expected = facts.get("different pairs expected")
    return "" if expected is None else f"; at most {expected:.2g} pairs of different images expected above it"


def demonstrated(result: DemoResult) -> str:
    """Return the demo's outcome and where its page is."""
    lines = [""]
    for group in result.headline_groups:
        lines += [figures_table(result.report.figures, group), ""]
    lines += result.report.summary
    return "\n".join([*lines, "", f"The page: {result.html}", f"The figures: {result.json}"])


def facts(values: dict[str, Any]) -> str:
    """Return names and values, one a line, indented where they nest."""

    def lines(value: dict[str, Any], indent: str) -> Iterator[str]:
        for name, held in value.items():
            if isinstance(held, dict):
                yield f"{indent}{name}:"
                yield from lines(held, indent + "  ")
            else:
                yield f"{indent}{name}: {size(held) if name == 'bytes' else _fact(held)}"

    return "\n".join(lines(values, ""))


def _fact(held: Any) -> str:
    if held is None:
        return "none"
    if isinstance(held, bool):
        return "yes" if held else "no"
    if isinstance(held, list | tuple):
        return ", ".join(map(str, held)) or "none"
    return f"{held:,}" if isinstance(held, int) else str(held)


def size(count: float) -> str:
    """Return bytes in the unit that leaves one to three digits before the point."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.2f} {unit}"
        count /= 1000
    raise AssertionError


def counted(n: int, what: str, many: str = "") -> str:
    """Return a number of things: ``1 shard``, ``2 shards``, or as many as are named: ``2 queries``."""
    return f"{n:,} {what if n == 1 else many or f'{what}s'}"


def verified(found: Verification, store: Path, repaired: int) -> str:
    """Return what a check of a store found."""
    lines = [f"{store}: {counted(found.shards, 'shard')}, {size(found.bytes)} checked"]
    if repaired:
        lines.append(f"  damaged shards that were made anew: {repaired:,}")
    if found.sampled:
        lines.append(
            f"  {counted(found.sampled, 'row')} encoded again; the largest difference is {found.worst:.2g}"
        )
    if found.open_shards:
        lines.append(f"  {counted(found.open_shards, 'shard')} not written yet; run encode again")
    lines += [
        f"  DAMAGED {'store' if d.shard is None else f'shard {d.shard}'}: {d.what}: {d.detail}"
        for d in found.damages[:50]
    ]
    if found.damaged_shards and not repaired:
        lines.append(
            f"  {counted(len(found.damaged_shards), 'shard')} to mend: latentstore verify {store} --repair"
        )
    if not found.damages:
        lines.append("  what is written is whole" if found.open_shards else "  whole")
    return "\n".join([*lines, *_sources(found)])


_CHANGED = {
    "missing": "are gone or cannot be read",
    "size": "have another size",
    "mtime": "have another time of modification; --check-sources reads them to tell what they hold",
    "content": "hold something else",
    "touched": "were only touched: they hold what was read",
}


def _sources(found: Verification) -> list[str]:
    """Return what became of the files that a store was made from."""
    if found.sources is None:
        return []
    lines = []
    for what, text in _CHANGED.items():
        here = [change.path for change in found.sources if change.what == what]
        if here:
            lines += [f"  SOURCES: {len(here):,} files {text}", *(f"    {printable(p)}" for p in here[:10])]
            lines += [f"    and {len(here) - 10:,} more"] if len(here) > 10 else []
    if any(change.what in ("size", "content") for change in found.sources):
        lines.append("  latentstore encode ... --retry-changed makes the shards of changed files anew")
    return lines or ["  every source file is as it was read"]


def removed(done: Removal) -> str:
    """Return what a takedown did."""
    if not done.rows and not done.shards:
        return f"{done.store}: nothing to remove (already removed)."
    arrays = f" of {len(done.arrays)} arrays" if len(done.arrays) > 1 else ""
    replaced = f"{counted(done.shards, 'shard')}{arrays} replaced"
    if not done.rows:
        return f"{done.store}: a removal that was interrupted is finished; {replaced}."
    return (
        f"{done.store}: {counted(len(done.rows), 'row')} removed; {replaced}, and what was derived "
        "from them was deleted. Image files, and stores simulated from this one, were not touched."
    )


def near_left(chosen: Chosen) -> str:
    """Return which near-duplicates a takedown leaves, or that they are not known."""
    if not chosen.near:
        return chosen.note or "No near-duplicates of them are known in the store."
    names = ", ".join(printable(path) for path in chosen.near[:10]) + (", …" if len(chosen.near) > 10 else "")
    return f"{len(chosen.near):,} near-duplicates stay: {names}. --near removes them, too."
