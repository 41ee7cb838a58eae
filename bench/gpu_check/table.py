"""The results as a short text, from the stages' files."""

from __future__ import annotations

from typing import Any

from gpu_check.record import Record

MARK = "REHEARSAL "  # before each line: none of it was measured on a GPU

# The lines of a speed table that are no optimizers: what memory allows, measured beside them.
COPY, UPDATE = "copy on the device", "in-place update"


def summary(records: list[Record], rehearsal: bool) -> str:
    """What happened in each stage, then its figures."""
    lines = []
    for record in records:
        if "stage" not in record.data:
            continue
        line = f"{record['stage']:<12}{record['status']:<12}{record.get('seconds', 0):5.0f} s"
        if record["problems"]:
            line += f"  {str(record['problems'][0]).splitlines()[0][:110]}"
        lines.append(line)
    lines.insert(0, next((str(record["device"]) for record in records if "device" in record.data), "nothing was run"))
    for record in records:
        make = MAKERS.get(record.get("stage"))
        try:
            lines += ["", *make(record)] if make and "stage" in record.data else []
        except (KeyError, TypeError, ValueError) as error:  # a stage that was cut short
            lines.append(f"{record['stage']}: no figures ({type(error).__name__}: {error})")
    for record in records:
        lines += [f"lacking ({record['stage']}): {text}"[:150] for text in record["lacking"]]
    return marked(lines, rehearsal)


def marked(lines: list[str], rehearsal: bool) -> str:
    return "\n".join((MARK + line).rstrip() if rehearsal else line for line in lines)


def correctness(record: Record) -> list[str]:
    lines = []
    for run in record.get("runs", []):
        counts = ", ".join(f"{run[name]} {name}" for name in ("passed", "failed", "skipped", "error") if run.get(name))
        lines.append(f"{run['run']}: {counts}")
        lines += [f"  {failure['test']}: {failure['message'][:100]!r}" for failure in run.get("failures", [])[:8]]
    if table := record.get("table"):
        lines.append(f"option table: {table['variants']} variants, {len(table['differences'])} differences")
    return lines


def speed(record: Record) -> list[str]:
    lines = []
    for case in [*record.get("cases", []), *([record["compiled"]] if record.get("compiled") else [])]:
        lines.append(f"{case['case']}, {case['dtype']}: device time of a step, median [min, max]")
        lines.append(f"{'':30}{'ms':>9} {'':19} {'B/param':>8} {'GB/s':>7} {'of copy':>8} {'/ AdamW':>8}")
        for result in case["results"]:
            line = f"{result['name']:<30}{result['ms']:9.3f} {_range(result, 3):>19}"
            if "GB_per_s" in result:
                rate, share = result["GB_per_s"], result["share_of_copy"]
                line += f" {result['bytes_per_parameter']:8.1f} {rate:7.0f} {share:8.1%}"
            else:
                line += " " * 26
            lines.append(f"{line} {result['of_adamw']:8.2f}" + "  (fits the L2)" * bool(result.get("in_cache")))
    return lines


def host(record: Record) -> list[str]:
    lines = []
    for case in record.get("cases", []):
        lines.append(f"{case['case']}: host time of step(), median [min, max]")
        lines.append(f"{'':30}{'us, idle':>10} {'':21} {'busy':>9} {'launches':>9}")
        for result in case["results"]:
            seen = case["launches"].get(result["name"], {}).get("launches", "")
            busy = "" if result["us_busy"] is None else f"{result['us_busy']:.0f}"
            lines.append(f"{result['name']:<30}{result['us']:10.0f} {_range(result, 0):>21} {busy:>9} {seen:>9}")
    for first in record.get("first_steps", []):
        times = f"{first['idle']:.1f} ms, behind {first['device_busy_ms']:.0f} ms of other work {first['busy']:.1f} ms"
        lines.append(f"{first['case']}: MAdam's first step {times}")
    return lines


def sanitizer(record: Record) -> list[str]:
    def outcome(run: dict[str, Any]) -> str:
        name = f"{run['tool']} of a planted fault" if run["fault"] else run["tool"]
        return f"{name}: {'did not finish' if run['errors'] is None else run['ours']}"

    return ["reports about our kernels by " + ", ".join(map(outcome, record.get("runs", [])))]


def simulator(record: Record) -> list[str]:
    kernels = record.get("kernels", [])
    differ = sum(bool(kernel["differences"]) for kernel in kernels)
    nans = sum(kernel["nan_bits"] for kernel in kernels)
    return [f"simulator against GPU: {len(kernels)} kernels, {differ} differ; {nans} NaN of other bits"]


def training(record: Record) -> list[str]:
    size = record["size"]
    lines = [
        f"{record['model']}, {size['parameters']:,} parameters, {size['tokens_per_step']:,} tokens a step: medians",
        f"{'':30}{'ms':>9} {'optimizer':>10} {'share':>7} {'host ms':>8}",
    ]
    for result in record["results"]:
        if result["steps"]:
            line = f"{result['name']:<30}{result['ms']:9.1f} {result['optimizer_ms']:10.2f} {result['share']:7.1%}"
            lines.append(f"{line} {result['host_ms']:8.1f}")
    return lines


def _range(result: dict[str, Any], digits: int) -> str:
    return f"[{result['min']:.{digits}f}, {result['max']:.{digits}f}]"


MAKERS = {
    "correctness": correctness,
    "speed": speed,
    "host": host,
    "sanitizer": sanitizer,
    "simulator": simulator,
    "training": training,
}
