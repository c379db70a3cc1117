"""The written report, as a path that notebooks display."""

import html
from pathlib import PosixPath


class Report(PosixPath):
    """Path of a `report.html`; a notebook shows the page itself."""

    def _repr_html_(self) -> str | None:
        if not self.is_file():  # such as its parent
            return None
        # A frame keeps the styles of the page and those of the notebook apart.
        page = html.escape(self.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" width="100%" height="800" style="border: 0"></iframe>'
