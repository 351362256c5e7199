"""Where the engine's time goes, and how far each part is from its limit.

    make profile            the table below, then (where `perf` is installed) time by function

The limit of additions is what the kernel itself reaches on weights and sums in the first cache,
measured beside the work.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from bench_linear import LIMIT_ADDS, in_first_cache
from workloads import RATES, firing_model

import atsnn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rates", choices=RATES, default="5 % / 15 %")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--level", default=None, help="instruction set (default: the best)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, x = firing_model(args.batch, args.rates, halting="rectangle")
    engine = atsnn.freeze(model)
    limit = in_first_cache()
    traces, limits = [], []
    end = time.perf_counter() + args.seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(5):
            limit()
        limits.append((time.perf_counter() - start) / 5)
        traces.append(engine(x, return_trace=True, level=args.level))
    most = LIMIT_ADDS / statistics.median(limits)
    cost = traces[0].cost
    total = statistics.median(t.seconds.total for t in traces)
    print(
        f"{engine}\nbatch {args.batch}, {args.threads} threads, {args.rates}, {len(traces)} calls"
    )
    print(f"{'part':10} {'ms':>8} {'share':>6} {'M SOPs':>8} {'G add/s':>8} {'of limit':>8}")
    for part, _ in traces[0].seconds:
        seconds = statistics.median(t.seconds[part] for t in traces)
        sops = cost.sops[part]
        speed = sops / seconds / 1e9 if seconds else 0.0
        print(
            f"{part:10} {1e3 * seconds:8.3f} {seconds / total:6.1%} {sops / 1e6:8.1f} "
            f"{speed:8.1f} {speed * 1e9 / most:8.2f}"
        )
    print(f"{'all':10} {1e3 * total:8.3f}   limit: {most / 1e9:.1f} G add/s in the first cache")


if __name__ == "__main__":
    main()
