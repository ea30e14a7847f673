"""A fold's account counted, and its rows as text: what the terminal and the page share."""

from __future__ import annotations

from dataclasses import dataclass

from bnexport.folding.report import OUTCOMES, FoldReport, FoldRow, Outcome
from bnexport.reporting.summary import NOTHING, number


@dataclass(frozen=True)
class Tally:
    """How many BatchNorm calls had one outcome by one rule.

    Attributes:
        outcome: A key of OUTCOMES.
        rule: "" for none.
        count: At least 1.
        dead: Channels whose scale is 0, over all of them.
    """

    outcome: Outcome
    rule: str
    count: int
    dead: int


def tallies(report: FoldReport) -> tuple[Tally, ...]:
    """Rows counted by outcome and rule: outcomes in the order of OUTCOMES, the most frequent rule first."""
    gathered: dict[tuple[Outcome, str], list[FoldRow]] = {}
    for row in report.rows:
        gathered.setdefault((row.outcome, row.rule), []).append(row)
    order = list(OUTCOMES)
    ranked = sorted(gathered.items(), key=lambda item: (order.index(item[0][0]), -len(item[1]), item[0][1]))
    return tuple(Tally(outcome, rule, len(rows), sum(row.dead for row in rows)) for (outcome, rule), rows in ranked)


def verdict_of(report: FoldReport) -> str:
    """The account in one sentence."""
    calls = f"{report.folded} of {len(report.rows)} BatchNorm call{'' if len(report.rows) == 1 else 's'} gone"
    left = f"{report.remaining} norm operation{'' if report.remaining == 1 else 's'} left in the graph"
    return f"{calls}, {left}"


def growth_of(report: FoldReport) -> str:
    """How much larger the weights became, as a sentence; "" when they did not."""
    if report.growth <= 1.005:
        return ""
    return f"the weights are {report.growth:.2f} times as large as before: shared ones had to be cloned"


def gain_of(row: FoldRow) -> str:
    """Smallest and largest |scale| as '0.12..3.4', one number where they agree, NOTHING where they are not known."""
    if row.gain is None:
        return NOTHING
    low, high = map(number, row.gain)
    return low if low == high else f"{low}..{high}"


def target_of(row: FoldRow) -> str:
    """Where a BatchNorm's numbers are now, and by which rule: 'conv1 (conv <- batch norm)'."""
    return f"{row.into} ({row.rule})" if row.into and row.rule else row.into or row.rule


def account_of(row: FoldRow) -> str:
    """Everything about a row that is a sentence, joined: target, reason, what would unlock it, dead channels."""
    unlock = f"would go with: {row.unlock}" if row.unlock else ""
    dead = f"{row.dead} dead channel{'' if row.dead == 1 else 's'}" if row.dead else ""
    return "; ".join(part for part in (target_of(row), row.reason, unlock, dead) if part) or NOTHING
