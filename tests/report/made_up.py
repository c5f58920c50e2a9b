"""Facts of networks that do not exist, of any length and with any names."""

from hawqfx.report.facts import Curve, Facts, Figure, KernelRow, MemoryRow, NodeRow, Point, SiteRow

HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'><!--"


def chain(count: int, name: str = "layer") -> Facts:
    """A chain of so many nodes, each with a weight and an activation."""
    names = [f"{name}{number}" for number in range(count)]
    sites = []
    for number, own in enumerate(names):
        bits, noise = 2 + number % 7, 40.0 - number % 30
        for key, kind in ((f"{own}.weight", "weight"), (own, "activation")):
            reason = f"{key}: because"
            width, increase, curvature = f"{bits} bits", 1e-3 * number, 1e-2 + number
            sites.append(
                SiteRow(key, key, kind, "conv2d", "4x4", 16, bits, width, 16, increase, curvature, 1e-3, noise, reason)
            )
    nodes = [
        NodeRow(own, own, "conv2d", "4x4", tuple(names[max(0, number - 1) : number]), f"{own}.weight", own, "")
        for number, own in enumerate(names)
    ]
    points = (
        Point("mixed precision", "4 bits", 10, 0.2, 0.1),
        Point("mixed precision", "5 bits", 12, 0.1, 0.12),
        Point("uniform bits", "4 bits", 11, 0.3, 0.11),
        Point("this network", name, 11, 0.15, 0.11),
    )
    return Facts(
        title=name,
        headline=(Figure("Budget", name, name),),
        curve=Curve("weight_bits", "bits on average", points),
        sites=tuple(sites),
        nodes=tuple(nodes),
        memory=tuple(MemoryRow(number, own, 8, 32) for number, own in enumerate(names)),
        kernels=tuple(KernelRow(own, f"{own}.weight", "integer", 1e-3, 2e-3) for own in names),
        noise_data="16 samples",
        reproduce=(Figure("Call", name),),
        summary=name,
        absent={},
    )
