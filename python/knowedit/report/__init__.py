"""Pages that show what an edit did."""

from knowedit.report.page import write_page as write_page
