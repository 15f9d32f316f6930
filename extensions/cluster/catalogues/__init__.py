"""Catalogues of hubs on a database server, named by the scheme of their URL and made from (url, timeout_s)."""
