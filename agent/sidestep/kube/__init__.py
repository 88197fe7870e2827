"""A small Kubernetes REST client: JSON in and out, lists that stay current. Shared by agent, control plane, lab and
demo.
"""
