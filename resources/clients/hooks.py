"""Has schemathesis keep to a few VMs, so that requests find some, and to the domain that the server has."""

import schemathesis

IDS = ["one", "two", "three"]
DOMAIN = "ci"


@schemathesis.hook
def map_path_parameters(context, path_parameters):
    if path_parameters and "id" in path_parameters:
        index = sum(map(ord, str(path_parameters["id"])))
        path_parameters["id"] = IDS[index % len(IDS)]
    if path_parameters and "domain" in path_parameters:
        path_parameters["domain"] = DOMAIN
    return path_parameters
