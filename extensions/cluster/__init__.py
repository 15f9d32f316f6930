"""How do many machines share one hub, and serve it? For those whose adapters are on PostgreSQL, S3 or a cluster.

`Hub("postgresql://..", blobs="s3://..")` finds the catalogue and the blobs here, which need psycopg, fsspec and the store's
package; `joblib.parallel_config(backend="dask")` or "ray" takes the workers of such a cluster; `replicated` runs servers on
Ray Serve and sends a request where its formula was last.
"""

from loraweave.extend import face

_MODULES = {"replicas": "replicated"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
