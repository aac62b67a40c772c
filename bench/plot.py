#!/usr/bin/env python3
"""plot.py FIGURES OUT: plots of the results, as SVG and PNG in the folder OUT (needs requirements.txt).

FIGURES is build/bench/results.csv or what `frontier` prints: frontier-tT (tokens a second in all against those of a
user) and budget-tT (drafts verified against the requests at once) for each temperature T; or
build/calibrate/reliability.csv: reliability (observed against predicted a_k, before and after)."""
import collections, csv, os, re, sys
import matplotlib
matplotlib.use("svg")
import matplotlib.pyplot as plt

matplotlib.rcParams |= {"svg.hashsalt": "dspark", "svg.fonttype": "none", "font.size": 9, "axes.grid": True,
                        "grid.alpha": .3, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
SHOWN = {"plain": "#888888", "block 1": "#c6dbef", "block 3": "#6baed6", "block 5": "#2171b5", "threshold": "#9467bd",
         "algorithm 1": "#ff7f0e", "asynchronous": "#2ca02c", "scheduler": "#d62728"}


def save(figure, out, name):
    for kind in "svg", "png":
        figure.savefig(os.path.join(out, f"{name}.{kind}"), dpi=110, bbox_inches="tight",
                       metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)


def loads(rows):
    """-> {temperature: {policy: {requests: {figure: value}}}}"""
    found = collections.defaultdict(lambda: collections.defaultdict(lambda: collections.defaultdict(dict)))
    for question, value in rows:
        m = re.fullmatch(r"closed t(\S+) (\d+) (.+) (throughput|user|verified)", question)
        if m: found[m[1]][m[3]][int(m[2])] |= {m[4]: value, "requests": int(m[2])}
    return found


def lines(axes, policies, x, y):
    for name in filter(policies.get, SHOWN):
        points = [f for _, f in sorted(policies[name].items())]
        axes.plot([f[x] for f in points], [f[y] for f in points], marker="o", ms=3, color=SHOWN[name], label=name,
                  lw=2 if name == "scheduler" else 1.2)
    axes.legend()


def frontier(rows, out):
    for t, policies in loads(rows).items():
        figure, axes = plt.subplots(figsize=(6, 4))
        lines(axes, policies, "user", "throughput")
        axes.set(xscale="log", xlabel="tokens/s for a user", ylabel="tokens/s in all",
                 title=f"1 to {max(max(p) for p in policies.values())} requests at once, temperature {t}")
        save(figure, out, f"frontier-t{t}")
        figure, axes = plt.subplots(figsize=(6, 4))
        lines(axes, policies, "requests", "verified")
        axes.set(xlabel="requests at once", ylabel="drafts verified, a request and step",
                 title=f"Verification budget by load, temperature {t}")
        axes.set_xscale("log", base=2), axes.xaxis.set_major_formatter("{x:.0f}")
        save(figure, out, f"budget-t{t}")


def reliability(rows, out):
    panels = sorted({(r["verify"], float(r["temperature"])) for r in rows})
    figure, axes = plt.subplots(2, len(panels), figsize=(2.2 * len(panels), 4.8), sharex=True, sharey=True,
                                squeeze=False)
    for (verify, t), column in zip(panels, axes.T):
        for stage, ax in zip(("before", "after"), column):
            ax.plot([0, 1], [0, 1], color="#888888", lw=.8)
            mine = [r for r in rows if (r["verify"], float(r["temperature"]), r["stage"]) == (verify, t, stage)]
            for k in sorted({int(r["position"]) for r in mine}):
                points = [r for r in mine if int(r["position"]) == k and int(r["cycles"]) >= 50]
                ax.plot([float(r["said"]) for r in points], [float(r["stood"]) for r in points], marker=".", lw=1,
                        color=plt.cm.viridis((k - 1) / 5), label=f"k = {k}")
            ax.set_title(f"{verify}, {t:g}, {stage}", fontsize=8)
        column[1].set_xlabel("a_k said")
    for row in axes: row[0].set_ylabel("prefixes that stood")
    axes[0][0].legend(fontsize=7)
    save(figure, out, "reliability")


def main(path, out):
    with open(path, newline="") as f: rows = list(csv.reader(f))
    os.makedirs(out, exist_ok=True)
    if rows[0][0] == "verify": return reliability([dict(zip(rows[0], r)) for r in rows[1:]], out)
    at = rows[0].index("question") if "question" in rows[0] else 0
    frontier([(r[at], float(r[at + 3])) for r in rows[at > 0:] if len(r) > at + 3], out)


main(*sys.argv[1:])
