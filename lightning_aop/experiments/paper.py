"""What the paper reports (Zhang, Rao and Yang, AAAI 2021), in % as (deletion, insertion, overall)."""

import re

Figures = tuple[float, float, float]

_ONE = {
    "gradcam": (17.92, 66.04, 48.12),
    "wgradcam": (17.23, 66.83, 49.60),
    "emp": (12.70, 49.21, 36.51),
    "igos": (8.76, 57.25, 48.49),
    "gradcam+emp": (11.90, 62.58, 50.68),
    "gradcam+igos": (8.97, 65.47, 56.50),
    "sigcam": (9.91, 67.57, 57.66),
}
_TWO = {
    "gradcam": ((16.72, 58.65), (16.95, 56.14), (13.33, 53.50)),
    "gradcam++": ((17.35, 57.55), (16.24, 53.83), (14.81, 50.04)),
    "igos": ((10.63, 44.67), (9.32, 49.28), (7.38, 38.47)),
    "xrai": ((24.97, 45.22), (16.66, 54.98), (15.78, 43.08)),
    "sigcam": ((10.97, 54.61), (10.22, 57.94), (7.80, 42.54)),
}
_THREE = {"gradcam": 25.78, "gradcam++": 29.91, "igos": 35.72, "xrai": 28.12, "sigcam": 38.64}
_OVERALL = {"gradcam": 40.43, "gradcam++": 37.68, "igos": 35.03, "xrai": 28.62, "sigcam": 42.04}


_NETWORKS = {"table1": ("inception_v3",), "table2": ("densenet201", "inception_v3", "vgg19")}


def reported(table: str | None, network: str, method: str) -> Figures | None:
    """Return what "table1" or "table2" reports of a method on a network, or None."""
    key = method_key(method)
    if table == "table1" and network == "inception_v3":
        return _ONE.get(key)
    if table == "table2" and key in _TWO:
        networks = _NETWORKS[table]
        if network in networks:
            deletion, insertion = _TWO[key][networks.index(network)]
            return deletion, insertion, round(insertion - deletion, 2)
    return None


def reported_overall(table: str | None, method: str) -> float | None:
    """Return the overall score of Table 2, the mean over its three networks, or None."""
    return _OVERALL.get(method_key(method)) if table == "table2" else None


def reported_difference(measure: str, method: str, other: str) -> float | None:
    """Return by how much a method is above another, in the first table that has both, or None.

    Args:
        measure: "deletion", "insertion" or "overall"; in Table 2 the mean over its three networks.
        method: its name.
        other: the other's.
    """
    place = ("deletion", "insertion", "overall").index(measure)
    for table, networks in _NETWORKS.items():
        rows = [(reported(table, n, method), reported(table, n, other)) for n in networks]
        both = [a[place] - b[place] for a, b in rows if a is not None and b is not None]
        if both:
            return sum(both) / len(both)
    return None


def reported_pointing(method: str) -> float | None:
    """Return the mean accuracy of Table 3, the pointing game with ResNet50, in %, or None."""
    return _THREE.get(method_key(method))


def method_key(method: str) -> str:
    """Return the name by which a method is known, whatever a table calls it: I-GOS is igos."""
    return re.sub(r"[^a-z+]", "", method.lower())
