"""A provider of machines for Ray's autoscaler, whose machines are processes on this one."""

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Machines(FakeMultiNodeProvider):
    """Ray's own, but a kind may have memory, as kinds on EC2 do: for what states its memory."""

    def create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
        without = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(node_config, tags, count, without, labels)
