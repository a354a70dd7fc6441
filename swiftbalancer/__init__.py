"""swiftbalancer: a background expert-parallel load balancer for Mixture-of-Experts serving."""

__version__ = "0.1.0"
