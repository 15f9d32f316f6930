"""Pairs of a catalogue and a place for blobs that hubs of tests are on, and what tests ask of such hubs."""

import itertools

import torch

from loraweave.hub.hub import Hub

# "share" is what fills files under their names, as network shares do
STORES = ("sqlite+folder", "sqlite+share", "postgres+folder", "postgres+s3")
NUMBERS = itertools.count()


def new_place(request, folder, stores):
    catalogue, blobs = stores.split("+")
    number = next(NUMBERS)
    where = str(folder / f"hub {number}")
    if catalogue == "postgres":
        where = request.getfixturevalue("postgres_server").url(f"hub_{number}")
    if blobs == "folder":
        return where, (str(folder / f"blobs {number}") if catalogue == "postgres" else None)
    if blobs == "share":
        request.getfixturevalue("share")
        return where, f"share://{number}/prefix"
    request.getfixturevalue("s3_server")
    import s3fs

    s3fs.S3FileSystem().mkdir(f"bucket-{number}")
    return where, f"s3://bucket-{number}/a/prefix"


def opened(place, **options):
    return Hub(place[0], blobs=place[1], **options)


def same(first, second):
    pairs = zip(first.layers["layer"].tensors().values(), second.layers["layer"].tensors().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)
