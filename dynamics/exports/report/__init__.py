"""report(): a result as one page for a browser, which needs neither a network nor a server."""
