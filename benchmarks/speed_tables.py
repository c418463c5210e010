"""Tables of speed: the runtime's engines beside PyTorch, the host's share, LoRAs, the service."""

from __future__ import annotations

from typing import Any

from records import machine_line, read


def cpu_table() -> str:
    """This runtime's engines and PyTorch's variants, the quickest first, and what could not run."""
    data = read("cpu_vs_torch")
    rows = [
        "| student | candidate | time, median (p10-p90) | CPU time | against the best PyTorch | image differs by |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for r in data["results"]:
        _, best = quickest(r, "PyTorch")
        for name, c in sorted(r["candidates"].items(), key=lambda item: item[1]["median_ms"]):
            student = f"{r['workload']}, {r['transformer_parameters'] / 1e6:.1f} M, {r['size_px']} px"
            cpu = "" if c["cpu_ms"] is None else f"{c['cpu_ms']:.1f} ms"
            rows.append(
                f"| {student} | {name} | {c['median_ms']:.1f} ms ({c['p10_ms']:.1f}-{c['p90_ms']:.1f}) | {cpu} "
                f"| {best['median_ms'] / c['median_ms']:.2f}x | {c['image_difference_levels']:.1f} of 255 |"
            )
        notes += [f"{r['workload']}: {name} could not run ({reason})." for name, reason in r["left_out"].items()]
    stages = {r["workload"]: quickest(r, "arcflow") for r in data["results"]}
    rows += ["", *notes, *[""] * bool(notes)]
    rows += ["Where the time of one image goes with the quickest engine, in milliseconds:", ""]
    names = list(next(iter(stages.values()))[1]["stages_ms"])
    rows += ["| student | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for workload, (name, found) in stages.items():
        cells = " | ".join(f"{found['stages_ms'][n]:.2f}" for n in names)
        rows.append(f"| {workload}, {name.removeprefix('arcflow, ')} | {cells} |")
    load = data["machine"].get("load_average")
    before = "" if load is None else f" Load average before: {', '.join(f'{x:.1f}' for x in load)}."
    return "\n".join([*rows, "", f"{machine_line(data)}{before}"])


def quickest(result: dict[str, Any], kind: str) -> tuple[str, dict[str, Any]]:
    """Name and figures of the quickest candidate whose name starts with `kind`."""
    found = {name: c for name, c in result["candidates"].items() if name.startswith(kind)}
    return min(found.items(), key=lambda item: item[1]["median_ms"])


def host_table() -> str:
    """The time of an image outside the engines, one row per runtime."""
    data = read("host_time")
    names = {"python": "Python, ONNX Runtime", "cpp": "C++, OpenVINO"}
    shares = list(data["results"][0]["shares_ms"])
    rows = [f"| runtime | outside engines, median (p10-p90) | {' | '.join(shares)} | engines |"]
    rows.append("|---" * (len(shares) + 3) + "|")
    for r in data["results"]:
        cells = " | ".join(f"{r['shares_ms'][share]:.3f}" for share in shares)
        rows.append(
            f"| {names[r['runtime']]} | {r['median_ms']:.3f} ms ({r['p10_ms']:.3f}-{r['p90_ms']:.3f}) "
            f"| {cells} | {r['engines_median_ms']:.2f} ms |"
        )
    return "\n".join([*rows, "", f"Medians of {r['runs']} images of {r['size_px']} px, in ms. {machine_line(data)}"])


def lora_table() -> str:
    """What LoRA slots cost, one row per variant, and what a switch takes."""
    data = read("lora")
    rows = ["| variant | time of an image | CPU time | CPU time, relative |", "|---|---|---|---|"]
    for r in data["results"]:
        relative = "1" if r["variant"] == r["relative_to"] else f"{r['cpu_ratio']:.3f}"
        rows.append(f"| {r['variant']} | {r['wall_ms']:,.0f} ms | {r['cpu_ms']:,.0f} ms | {relative} |")
    s, linears = data["switches"], data["linears"]
    load = ", ".join(f"{x:.1f}" for x in data["machine"]["load_average"])
    return "\n".join(
        [
            *rows,
            "",
            f"Medians of {data['runs']} images of {data['px']} px with {data['text_tokens']} text tokens. Slots of "
            f"{linears['attn']} linears (attn) and {linears['all']} (all). A switch to LoRAs that are prepared: "
            f"{s['prepared_ms']:.3f} ms. To prepare them, rank 16 and all linears: {s['prepare_ms']:.0f} ms; to read a "
            f"file of {s['file_bytes'] / 1e6:.1f} MB and prepare it: {s['new_file_ms']:.0f} ms; diffusers' hotswap of "
            f"the same factors from memory: {s['hotswap_ms']:.0f} ms.",
            "",
            f"{machine_line(data)} Load average before: {load}.",
        ]
    )


#: Servers of benchmarks/serve.py.
_SERVERS = {
    "lanes": "the pipeline, no HTTP",
    "service": "`arcflow serve`",
    "ray": "Ray Serve",
    "triton": "Triton, raw pixels",
    "torch": "PyTorch behind FastAPI",
}


def serve_lines(data: dict[str, Any]) -> str:
    """The results of `serve.py`, one row per server and loop."""
    rows = [
        "| server | requests from | images per second | p50 | p99 | images of a batch | refused | peak resident |",
        "|---" * 8 + "|",
    ]
    for name, found in data["results"].items():
        for i, run in enumerate(found["runs"]):
            closed = run["loop"] == "closed"
            source = _clients(run) if closed else f"open loop, {run['rate_per_s']:g} per second"
            refused = sum(n for status, n in run["statuses"].items() if status != "200")
            measured = (
                [f"{run['p50_ms']:.1f} ms", f"{run['p99_ms']:.1f} ms", f"{run['mean_batch_size']:.1f}"]
                if run["p50_ms"] is not None
                else ["-"] * 3
            )
            peak = "" if i else f"{found['peak_resident_bytes'] / 2**20:.0f} MiB"
            cells = ["" if i else _SERVERS[name], source, f"{run['images_per_s']:.0f}", *measured, str(refused), peak]
            rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    rows += ["", *_beside_the_pipeline(data["results"])]
    note = f"{data['size_px']} px, {data['steps']} steps, {data['lanes']} lanes, each loop in {data['rounds']} turns"
    load = ", ".join(f"{x:.1f}" for x in data["machine"]["load_average"])
    return "\n".join([*rows, f"{note}. {machine_line(data)} Load average before: {load}."])


def _beside_the_pipeline(results: dict[str, Any]) -> list[str]:
    """What the service costs, in words, where both were measured."""
    if not {"lanes", "service"} <= results.keys():
        return []
    pairs = list(zip(results["lanes"]["runs"], results["service"]["runs"], strict=True))
    closed = {alone["clients"]: (alone, service) for alone, service in pairs if alone["loop"] == "closed"}
    (few_alone, few), (many_alone, many) = closed[min(closed)], closed[max(closed)]
    more_ms = few["p50_ms"] - few_alone["p50_ms"]
    share = many["images_per_s"] / many_alone["images_per_s"]
    beside = f"At {_clients(few)}, `arcflow serve` takes {more_ms:.1f} ms more than the pipeline alone at p50"
    return [f"{beside}; at {_clients(many)}, it generates {share:.0%} of the pipeline's images per second.", ""]


def _clients(run: dict[str, Any]) -> str:
    return "1 client" if run["clients"] == 1 else f"{run['clients']} clients"


def serve_table() -> str:
    """The service beside the pipeline alone."""
    return serve_lines(read("serve"))


def soak_lines() -> str:
    """What was left of the requests of `serve_soak.py`."""
    data = read("serve_soak")
    found = data["results"]
    answers, last = found["statuses"], found["rows"][-1]
    most = {name: max(row[name] for row in found["rows"]) for name in ("threads", "files")}
    wrong = sum(n for status, n in answers.items() if status != "200")
    return (
        f"{last['requests']:,.0f} requests in {found['seconds'] / 60:.0f} minutes: {answers['200']:,} replies with "
        f"images, {wrong:,} refusals of wrong requests, and {found['left']:,} clients that left. "
        f"Resident memory at the end {last['resident_bytes'] / 2**20:.0f} MiB, "
        f"{found['growth']['resident_bytes']:+.1%} from the second quarter's median to the last quarter's; "
        f"at most {most['threads']} threads and {most['files']} open files. {machine_line(data)}"
    )
