"""Arrays in Zarr v3 files, read and written unit by unit.

    shard.py        one shard file: where each unit lies, what its index says
    access.py       open files and buffers of one owner; past the page cache where the file system allows it
    blocks.py       bytes between a shard file and memory
    spans.py        bytes of a file that begin and end anywhere, in whole blocks
    units.py        units between a shard file and memory, with their checksums
    checksums.py    CRC-32C of units
    compressed.py   units between a shard file and memory, where they are compressed
    index.py        the index of a shard file on the disk
    settling.py     what was written to the disk, and out of the page cache
    array.py        one Zarr array: how it is cut into shard files, and its zarr.json
    encoding.py     how zarr.json names the codecs that made an array's bytes
    header.py       what the group of a weight store says about itself
    weights.py      WeightStore: the imported weights of one model, read by tensor name
    writing.py      StoreWriter: makes a weight store page by page, and goes on with an unfinished one
    run_folder.py   a folder for one run's files, cleaned up even after a crash
    scratch.py      regions that live as long as a run
    descriptors.py  open files, a bounded number of them

Stock zarr-python reads every array; this package moves the bytes itself, because it can then read straight into the
buffer that they are wanted in. A *unit* is an inner chunk of Zarr's `sharding_indexed` codec, a *page* is a shard.
bfloat16, which Zarr lacks, is stored as its bits in uint16 with the attribute `{"dtype": "bfloat16"}`. What a
codec made of numbers is an array of float32 in their own shape whose units are serialised by `flexflow_engine.<codec>`
instead of `bytes`; with the package installed, stock zarr-python decodes them. Units may be compressed by one of Zarr's
bytes-to-bytes codecs; then they have any size, and the index is needed to find them.
"""
