"""Hubs: stores of rows and blobs, sources, examiners, embedders, keys and indexes (the registries of these names)."""

from loraweave.registry import face

_MODULES = {
    "common.files": "is_damage unsynced without_credentials",
    "hub": "compositions",
    "hub.adding": "MAX_BATCH_BYTES Addition checked_policy prepare",
    "hub.embedders": "sentence",
    "hub.embedders._embedder": "Embedder embedder_of readable",
    "hub.indexes.flat": "Flat saved_array",
    "hub.licenses": "canonical is_accepted stated_license",
    "hub.pool": "StackedFactors require_everywhere",
    "hub.search.keys": "Keys Segment Stamp",
    "hub.sources": "Repository model_hub_client",
    "hub.stores.blobs": "examine_blob put_together stored_adapter take_apart",
    "hub.stores.catalogue": "state_row",
    "hub.stores.folder_blobs": "STALE_TMP_S FolderBlobs digests listed",
    "hub.stores.migrations": "migrate run_step",
    "hub.stores.open_stores": "blobs_of",
    "hub.stores.protocols": "BlobStore CatalogueStore Connection Near SharedCatalogue VectorSearch",
    "hub.stores.storing": "Prepared put_content recorded_blob usable_blob",
    "hub.stores.verify": "blob_problems",
    "hub.tables": "rows versions",
    "hub.tables.fields": "checked_fields",
    "hub.tables.filtering": "Filters store_labels",
    "hub.tables.rows": "stored_rows",
    "hub.tables.vectors": "row_sha256",
    "retrieval.query": "KeySpace Query",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES, "loraweave")
