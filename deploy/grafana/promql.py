"""PromQL expressions. In each, `where` holds further matchers, and `by` the labels of the result.

Called by: `boards/`. Calls: nothing.
"""

from __future__ import annotations

RANKED = 'variant!=""'  # ranked by the model; refusals and the input order are quick and would hide slow rankings
LOOKUPS = 'result!~"corrupt|mismatched"'  # one result for each look-up; these two come in addition to it


def series(metric: str, where: str = "") -> str:
    """The metric of the replicas that the dashboard's variable selects."""
    return f'{metric}{{instance=~"$instance"{where and ", " + where}}}'


def rate(metric: str, by: str = "", where: str = "") -> str:
    return f"sum by ({by}) (rate({series(metric, where)}[$__rate_interval]))"


def quantile(q: float, histogram: str, by: str = "", where: str = "") -> str:
    return f"histogram_quantile({q}, {rate(histogram + '_bucket', f'le, {by}' if by else 'le', where)})"


def quantiles(histogram: str, where: str = "", of: tuple[float, ...] = (0.5, 0.95, 0.99)) -> list[tuple[str, str]]:
    """(legend, expression) of each quantile."""
    return [(f"p{q * 100:g}", quantile(q, histogram, where=where)) for q in of]


def share(part: str, whole: str) -> str:
    """The ratio of two sums by the same labels; 0 while the series of `part` do not exist yet."""
    return f"({part} or 0 * {whole}) / {whole}"
