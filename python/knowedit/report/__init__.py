"""Pages that show what an edit did."""

from .page import write_page as write_page
