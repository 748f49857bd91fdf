"""The built-in shop: customers, events by day, and the latent state behind them."""

from churn_assets.simulator.params import Offer, ShopParams
from churn_assets.simulator.scenarios import Scenario
from churn_assets.simulator.shop import Shop

__all__ = ["Offer", "Scenario", "Shop", "ShopParams"]
