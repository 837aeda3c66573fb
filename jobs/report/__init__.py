"""What people look at: report, card and contact sheet; and the timings behind them. Knows no driver.

Each name is imported when it is used first, because charts import matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overtone.jobs.report.card_contents import contents
    from overtone.jobs.report.dataset_card import CARD, card, card_rows, finished_job, write_card
    from overtone.jobs.report.html import report
    from overtone.jobs.report.pages import data_uri, page, style, svg
    from overtone.jobs.report.sheet import contact_sheet, first_pictures
    from overtone.jobs.report.times import WorkerTime
    from overtone.jobs.report.timings import Timings

_PUBLIC = {
    "CARD": "dataset_card",
    "card": "dataset_card",
    "card_rows": "dataset_card",
    "contents": "card_contents",
    "finished_job": "dataset_card",
    "write_card": "dataset_card",
    "report": "html",
    "data_uri": "pages",
    "page": "pages",
    "style": "pages",
    "svg": "pages",
    "contact_sheet": "sheet",
    "first_pictures": "sheet",
    "Timings": "timings",
    "WorkerTime": "times",
}

__all__ = [
    "CARD",
    "Timings",
    "WorkerTime",
    "card",
    "card_rows",
    "contact_sheet",
    "contents",
    "data_uri",
    "finished_job",
    "first_pictures",
    "page",
    "report",
    "style",
    "svg",
    "write_card",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
