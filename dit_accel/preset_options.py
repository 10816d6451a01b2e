"""Options that several presets share."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from dit_accel.components import choose, names
from dit_accel.density import Budget
from dit_accel.layout import Layout
from dit_accel.options import Opt
from dit_accel.rest import FirstOrder, Rest
from dit_accel.route import Route

DenseSteps = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)],
    Opt("denoising steps that stay dense, the first ones: a count, or a fraction of all"),
]
DenseLayers = Annotated[
    tuple[int, ...], Opt("layers that stay dense; negative ones count from the last")
]
DenseBelow = Annotated[
    Literal["auto"] | Annotated[int, Field(ge=0)],
    Opt(
        "sequences of fewer tokens stay dense; auto is where dense attention was measured to be "
        "faster on the GPU at hand, in a pipeline"
    ),
]
DenseBackend = Literal["sdpa", "cudnn", "flash", "flash3", "xformers"]
Density = Annotated[Budget, Opt("share of the video's block pairs computed exactly")]
BlockSize = Annotated[int, Opt("tokens in a block"), Field(ge=1)]
LayoutOption = Annotated[
    str | Layout,
    Opt("order of the tokens", names("layout"), Layout, partial(choose, "layout")),
]
RouteOption = Annotated[
    str | Route,
    Opt("how the exact blocks are chosen", names("route"), Route, partial(choose, "route")),
]
Clusters = Annotated[
    Annotated[int, Field(ge=1)] | None,
    Opt("clusters of layout=kmeans; none keeps their size what it is in the paper"),
]
RestOption = Annotated[
    str | Rest,
    Opt("what stands in for the pairs not computed", names("rest"), Rest, partial(choose, "rest")),
]
TaylorOption = Annotated[
    FirstOrder | None, Opt("first-order term of the rest; drop and centroid have none")
]
WeightOption = Annotated[
    Literal["second", "gaussian"], Opt("correction of the weights by rest=moment")
]
