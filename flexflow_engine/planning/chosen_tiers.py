"""The tiers that a recipe names, as they can be opened, and the one that it may lack."""

from __future__ import annotations

from flexflow_engine.jobs.recipe import Recipe
from flexflow_engine.planning.plan import needs_staging
from flexflow_engine.planning.profile.needs import TierChoice
from flexflow_engine.plugins import Registry

STAGING_TIER = "staging"
"""Host memory between a disk and a compute tier that the host can't address, where the recipe names none; as large as
it need be."""
STAGING_PLUGIN = "pinned"


def named_tiers(recipe: Recipe, registry: Registry) -> tuple[TierChoice, ...]:
    """Those of the recipe, fastest first. Raises PluginError for a plugin that there is not."""
    return tuple(
        TierChoice(name=tier.name, tier_class=registry.tier(tier.plugin), options=tier.options) for tier in recipe.tiers
    )


def job_tiers(recipe: Recipe, registry: Registry) -> tuple[TierChoice, ...]:
    """The same, and a staging tier with the options that it has by itself, if bytes must pass through it."""
    named = named_tiers(recipe, registry)
    classes = {tier.name: tier.tier_class for tier in named}
    if not needs_staging(classes):
        return named
    name, staging = STAGING_TIER, registry.tier(STAGING_PLUGIN)
    while name in classes:
        name += "_"
    return (*named, TierChoice(name=name, tier_class=staging, options=staging.Options()))
