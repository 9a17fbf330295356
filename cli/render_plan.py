"""What a plan says in the terminal: what was measured, then what is extrapolated from it."""

from __future__ import annotations

from cli.render import counted, printable, size, table
from latentstore.plan import Extent, Pace, Plan
from latentstore.trial import Costs


def planned(found: Plan) -> str:
    """Return a plan in the terminal."""
    what = "a new store" if found.new else "goes on"
    lines = [f"{printable(found.store)}: {what}, {found.rows:,} rows. Nothing was written.", ""]
    lines += ["Measured here and now", *_pairs(_measured(found))]
    if found.costs is not None:
        lines += [f"      {printable(p)}: {status}: {why}" for p, status, why in found.costs.bad_named]
    lines += ["", "Extrapolated from it", *_pairs(_extrapolated(found)), ""]
    lines.append(_table(found.extents, found.pace))
    return "\n".join(lines)


def _measured(found: Plan) -> list[tuple[str, str]]:
    each = 1e6 * found.list_seconds / max(1, found.listed)
    machine = f"{found.cores} cores, {found.threads} threads that decode, encoder on {found.device}"
    out = [("list", f"{found.listed:,} files in {found.list_seconds:.2f} s ({each:,.0f} µs a file)")]
    if found.costs is not None:
        out += _costs(found.costs, found.batch)
    else:
        out.append(("sample", "none (--sample 0): how long it will take is unknown"))
    return [*out, ("free disk", size(found.free_bytes)), ("machine", machine)]


def _costs(costs: Costs, batch: int) -> list[tuple[str, str]]:
    encode = f"{costs.encode_ms:.2f} ± {costs.encode_spread_ms:.2f} ms ({costs.encode_cpu_ms:.2f} ms of CPU)"
    bad = f", {costs.bad:,} of them bad" if costs.bad else ", none bad"
    return [
        ("sample", f"{costs.sampled:,} images{bad}; {costs.file_bytes / 1e3:,.0f} kB a file"),
        ("read", f"{costs.read_ms:.2f} ms an image, one thread"),
        (
            "decode",
            f"{costs.decode_ms:.2f} ms with resizing; reading and decoding ± {costs.spread_ms:.2f} ms",
        ),
        ("encode", f"{encode} at batches of {batch}"),
        ("write", f"{costs.write_rate / 1e6:,.0f} MB/s to the store's disk, with fsync"),
    ]


def _extrapolated(found: Plan) -> list[tuple[str, str]]:
    left = f"{found.rows_left:,} rows" + ("" if found.new else f" of {found.rows:,}")
    most = "at most " if found.codec else ""
    out = [
        ("left to do", f"{left} in {counted(found.shards_left, 'shard')} of {found.shard_rows:,} rows"),
        ("bytes", f"{most}{size(found.bytes_left)}: {found.dim:,} numbers a row as {found.dtype}, and lists"),
    ]
    if found.pace is None or found.hours is None or found.lost_seconds is None:
        return [*out, ("time", "unknown")]
    rate = f"{1 / found.pace.seconds:,.1f} images/s"
    return [
        *out,
        ("time", f"{_range(found.hours, found.pace)} on this machine: {rate}"),
        ("limit", _limits(found.pace)),
        ("a kill costs", f"at most one open shard a worker: {duration(found.lost_seconds)}"),
    ]


def _limits(pace: Pace) -> str:
    others = [f"{name} {1000 * s:.2f}" for name, s in pace.limits.items() if name != pace.bottleneck]
    if pace.padding > 1.005:
        others.append(
            f"the last batch of a shard is filled up: {pace.padding:.2f} times the rows are encoded"
        )
    return f"{pace.bottleneck}: {1000 * pace.seconds:.2f} ms an image ({', '.join(others)})"


def _range(hours: float, pace: Pace) -> str:
    """Return a time; two of them where the sample leaves more than a tenth open."""
    if pace.spread <= 0.1:
        return duration(3600 * hours)
    most = 1 + pace.spread
    return f"{duration(3600 * hours / most)} to {duration(3600 * hours * most)}"


def _table(extents: list[Extent], pace: Pace | None) -> str:
    rows = []
    for e in extents:
        time = "unknown" if e.hours is None or pace is None else _range(e.hours, pace)
        fits = "yes" if e.fits else "no"
        rows.append([e.what, f"{e.rows:,}", f"{e.machines:,}", size(e.bytes), fits, time])
    return (
        table(["", "rows", "machines", "bytes", "fits here", "time"], rows)
        + "\n  Machines like this one, on this disk; whole shards each; nothing else slows them."
    )


def _pairs(pairs: list[tuple[str, str]]) -> list[str]:
    return [f"  {name:<12}  {text}" for name, text in pairs]


def duration(seconds: float) -> str:
    """Return a time in the unit that a person would use."""
    for unit, length, upto in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 72), ("days", 86400, None)):
        if upto is None or seconds < upto * length:
            return f"{seconds / length:,.1f} {unit}"
    raise AssertionError
