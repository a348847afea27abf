"""RainbowPO: the components of preference optimisation as independent switches of one loss."""
