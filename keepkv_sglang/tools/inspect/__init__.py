"""`keepkv inspect`, one request as a page: command.py -> records.py -> row.py -> page.py and page.{html,css,js}."""
