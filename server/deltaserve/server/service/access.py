"""Which role each method needs."""

from __future__ import annotations

from deltaserve.server.identity.caller import Role

NEEDED: dict[str, Role] = {
    "deltaserve.v1.GenerationService/Generate": Role.GENERATE,
    "deltaserve.v1.GenerationService/GenerateStream": Role.GENERATE,
    "deltaserve.v1.GenerationService/Score": Role.GENERATE,
    "deltaserve.v1.GenerationService/SetWeights": Role.GENERATE,
    "deltaserve.v1.GenerationService/Tokenize": Role.GENERATE,
    "deltaserve.v1.GenerationService/Detokenize": Role.GENERATE,
    "fmaas.GenerationService/Generate": Role.GENERATE,
    "fmaas.GenerationService/GenerateStream": Role.GENERATE,
    "fmaas.GenerationService/Tokenize": Role.GENERATE,
    "fmaas.GenerationService/ModelInfo": Role.GENERATE,
    "deltaserve.v1.AdapterService/LoadAdapter": Role.ADAPTERS,
    "deltaserve.v1.AdapterService/UnloadAdapter": Role.ADAPTERS,
    "deltaserve.v1.AdapterService/PinAdapter": Role.ADAPTERS,
    "deltaserve.v1.AdapterService/GetAdapter": Role.GENERATE,
    "deltaserve.v1.AdapterService/ListAdapters": Role.GENERATE,
    "deltaserve.v1.AdapterService/WatchAdapters": Role.GENERATE,
    "deltaserve.v1.ServerService/GetServerInfo": Role.GENERATE,
    "deltaserve.v1.ServerService/GetStats": Role.GENERATE,
    "deltaserve.v1.RouteService/PutRoute": Role.ROUTES,
    "deltaserve.v1.RouteService/DeleteRoute": Role.ROUTES,
    "deltaserve.v1.RouteService/RollBackRoute": Role.ROUTES,
    "deltaserve.v1.RouteService/GetRoute": Role.GENERATE,
    "deltaserve.v1.RouteService/ListRoutes": Role.GENERATE,
    "deltaserve.v1.RouteService/RecordFeedback": Role.FEEDBACK,
    "deltaserve.v1.RouteService/GetReport": Role.FEEDBACK,
    "deltaserve.v1.RouteService/EraseUser": Role.ADMIN,
    "deltaserve.v1.IdentityService/CreateKey": Role.ADMIN,
    "deltaserve.v1.IdentityService/ListKeys": Role.ADMIN,
    "deltaserve.v1.IdentityService/RevokeKey": Role.ADMIN,
    "deltaserve.v1.IdentityService/PutTenant": Role.ADMIN,
    "deltaserve.v1.IdentityService/GetTenant": Role.ADMIN,
    "deltaserve.v1.IdentityService/ListTenants": Role.ADMIN,
    "deltaserve.v1.IdentityService/DeleteTenant": Role.ADMIN,
}
"""By the path that gRPC knows it by. A method that is missing here cannot be called."""
