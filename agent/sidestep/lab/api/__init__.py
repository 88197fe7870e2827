"""The lab's Kubernetes API: enough of it for kubectl, the agent, the control plane and the lab's nodes.

Objects live in memory (`store`), what may be written is decided in one place (`cluster`, with `fields` for the shape
and `defaults` for what Kubernetes would add), `server` puts HTTP around it. The lab's controllers work on the same
`Cluster` in the same process.

Words: a *kind* is a row of `resources.KINDS`; an *object* is the JSON object as Kubernetes defines it, a dict that
nobody changes once it is stored; a *revision* is the store's counter, an object's `resourceVersion`.
"""
