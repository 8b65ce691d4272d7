"""A pretrained model with Attention Residuals, trained on beside itself without them: did it help?"""

from .conduct import upgrade
from .config import UpgradeConfig

__all__ = ["UpgradeConfig", "upgrade"]
