"""Catalogues of hubs on a server, each named by the scheme of its URL; one is made from (url, timeout_s)."""
