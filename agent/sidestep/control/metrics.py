"""Counters of the control plane, and the page that Prometheus reads. Gauges are read from their owners at scrape."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

Gauges = Callable[[], dict[str, tuple[str, str, dict[str, float]]]]


class Metrics:
    """All counters. Label values are from fixed sets, so that no caller can make them many."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"sidestep_control_{name}", text, labels, registry=self._registry)

        self.pushes = counter("xds_pushes", "Responses sent to followers", "type")
        self.pushed = counter("xds_pushed_records", "Records sent in them", "type")
        self.pushed_bytes = counter("xds_pushed_bytes", "Bytes of them", "type")
        self.answers = counter("xds_answers", "Responses acknowledged or refused by followers", "type", "answer")
        self.streams = counter("xds_streams", "Streams accepted or refused", "outcome")
        self.certificates = counter("certificates", "Certificate requests", "outcome")

    def gauges(self, source: Gauges) -> None:
        """Adds gauges: name -> (text, label name, value by label)."""
        self._registry.register(_Gauges(source))

    def page(self) -> bytes:
        """In the text format."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    def __init__(self, source: Gauges) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        for name, (text, label, values) in self._source().items():
            family = GaugeMetricFamily(f"sidestep_control_{name}", text, labels=[label])
            for value_of, value in values.items():
                family.add_metric([value_of], value)
            yield family
