"""Which role each method needs."""

from __future__ import annotations

from deltaserve.server.identity.caller import Role

NEEDED: dict[str, Role] = {
    "GenerationService/Generate": Role.GENERATE,
    "GenerationService/GenerateStream": Role.GENERATE,
    "GenerationService/Score": Role.GENERATE,
    "GenerationService/SetWeights": Role.GENERATE,
    "GenerationService/Tokenize": Role.GENERATE,
    "GenerationService/Detokenize": Role.GENERATE,
    "AdapterService/LoadAdapter": Role.ADAPTERS,
    "AdapterService/UnloadAdapter": Role.ADAPTERS,
    "AdapterService/PinAdapter": Role.ADAPTERS,
    "AdapterService/GetAdapter": Role.GENERATE,
    "AdapterService/ListAdapters": Role.GENERATE,
    "AdapterService/WatchAdapters": Role.GENERATE,
    "ServerService/GetServerInfo": Role.GENERATE,
    "RouteService/PutRoute": Role.ROUTES,
    "RouteService/DeleteRoute": Role.ROUTES,
    "RouteService/RollBackRoute": Role.ROUTES,
    "RouteService/GetRoute": Role.GENERATE,
    "RouteService/ListRoutes": Role.GENERATE,
    "RouteService/RecordFeedback": Role.FEEDBACK,
    "RouteService/GetReport": Role.FEEDBACK,
}
"""By the method's name without its package. A method that is missing here cannot be called."""
