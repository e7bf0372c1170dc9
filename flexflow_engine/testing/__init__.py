"""Conformance suites that plugins inherit, and tiers that make hardware's behaviour testable without the hardware.

tier_suite   `TierTests`: subclass it for a tier of your own
codec_suite  `CodecTests`: subclass it for a codec of your own
model_suite  `ModelTests`: subclass it for a model of your own
tiers        `ThrottledTier`, a slow link; `IslandTier`, memory that the host can't address
async_tier   `StreamIslandTier`, an island whose copies are late, as an accelerator's are
traffic      `read_units`, `write_units`: a lane's work in one call
dense        `DenseMatrix`, weights that are simply there
layer_run    `LayerRun`, a model's functions on random weights
page_cache   how much of a folder's files the system's page cache holds
allocations  `PeakAllocations`, the most bytes that torch held at once

Needs the packages of the extra `test`: pytest and hypothesis.
"""
