"""OpenTelemetry spans of requests: the optional part behind the extra ``otel``.

A request is one span; under it, for each choice, its wait in the queue, its prefill and its
decoding. They are written when the request has ended, from times that were taken anyway.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .. import __version__
from ..request import RequestOutput, RequestTimes
from .request_log import EndedRequest

_PARENT = TraceContextTextMapPropagator()


class SpanRecorder:
    """Writes the spans of ended requests to a provider's exporters."""

    def __init__(self, provider: TracerProvider, model: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("nsa_serve", __version__)
        self._model = model

    def record(self, ended: EndedRequest) -> None:
        """The request's span, child of the client's (traceparent) if it sent one."""
        offset = time.time() - time.monotonic()
        span = self._tracer.start_span(
            f"{ended.method} {ended.path}",
            context=_PARENT.extract(ended.headers),
            kind=SpanKind.SERVER,
            start_time=_nanoseconds(ended.start + offset),
            attributes=self._attributes(ended),
        )
        if ended.status >= 500 or ended.status == 0:
            span.set_status(StatusCode.ERROR)
        for final in ended.finals:
            self._record_choice(final, set_span_in_context(span), offset)
        span.end(_nanoseconds(ended.end + offset))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _attributes(self, ended: EndedRequest) -> dict[str, str | int | list[str]]:
        """In the names of OpenTelemetry's conventions for HTTP and for generative models."""
        fields = ended.fields()
        return {
            "http.request.method": ended.method,
            "url.path": ended.path,
            "http.response.status_code": ended.status,
            "gen_ai.request.model": self._model,
            "http.response.header.x-request-id": [ended.request_id],
            "gen_ai.response.id": ended.answer_id or "",
            "gen_ai.usage.input_tokens": ended.num_prompt,
            "gen_ai.usage.output_tokens": ended.num_generated,
            "gen_ai.response.finish_reasons": fields.get("finish_reasons", []),
        }

    def _record_choice(self, final: RequestOutput, parent: Context, offset: float) -> None:
        if final.times is None:
            return
        for name, start, end in _phases(final.times):
            span = self._tracer.start_span(
                name, context=parent, start_time=_nanoseconds(start + offset)
            )
            span.end(_nanoseconds(end + offset))


def _phases(times: RequestTimes) -> Iterator[tuple[str, float, float]]:
    """(name, start, end) of the phases that a request reached."""
    first, token, last = times.first_scheduled, times.first_token, times.last_token
    if first is not None:
        yield "queue", times.arrival, first
    if first is not None and token is not None:
        yield "prefill", first, token
    if token is not None and last is not None:
        yield "decode", token, last


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def span_recorder(endpoint: str, model: str) -> SpanRecorder:
    """Spans go to an OTLP collector over HTTP, such as http://localhost:4318/v1/traces."""
    resource = Resource.create({"service.name": "nsa-serve", "service.version": __version__})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return SpanRecorder(provider, model)
