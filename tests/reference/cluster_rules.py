"""What a statement may not be, so that it runs on a table that Citus has distributed by `tenant_id`.

Each rule was measured on a cluster (Citus 13.2, PostgreSQL 15). The statement is parsed by PostgreSQL's own grammar.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pglast import ast, parse_sql
from pglast.visitors import Visitor

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS: Final = ("device_state", "device_shadow_history")
WRITES: Final = (ast.InsertStmt, ast.UpdateStmt, ast.DeleteStmt)
# What may be called in SET and RETURNING: `now` is STABLE, and Citus computes it once; the others are IMMUTABLE.
CALLED_IN_SET: Final = {"now", "jsonb_typeof"}
CALLED_IN_RETURNING: Final = {"extract"}
SETS: Final = {
    "unnest",
    "jsonb_array_elements",
    "jsonb_each",
    "jsonb_object_keys",
    "jsonb_to_recordset",
    "generate_series",
}

ONE_STATEMENT = "several statements cannot be sent as one"
TENANT = "each of our tables is named with `tenant_id = parameter`"
TENANT_INSERTED = "an INSERT names tenant_id, and gives it a parameter"
TENANT_MOVED = "an UPDATE cannot change tenant_id"
VOLATILE_IN_SET = "SET calls nothing but now() and what is IMMUTABLE"
NOW_IN_CASE = "now() stands in no CASE and no COALESCE of an UPDATE"
CALL_IN_CONFLICT = "ON CONFLICT DO UPDATE calls no function that is not IMMUTABLE"
SET_BESIDE_WRITE = "no function returns rows beside a CTE that writes"
CONSTANT_CTE = "beside a CTE that writes, each CTE reads one of our tables or another CTE"
STABLE_IN_RETURNING = "RETURNING calls nothing that is not IMMUTABLE"
NO_MERGE = "MERGE cannot insert"


def broken(sql: str) -> list[str]:
    """The rules that the statement breaks."""
    parsed = parse_sql(sql)
    if len(parsed) != 1:
        return [ONE_STATEMENT]
    found = _Rules(parsed[0].stmt)
    return sorted(set(found.broken))


class _Rules(Visitor):
    def __init__(self, statement: Any) -> None:
        super().__init__()
        self.broken: list[str] = []
        self(statement)
        ctes = list(_nodes(statement, ast.CommonTableExpr))
        if any(isinstance(cte.ctequery, WRITES) for cte in ctes):
            self._beside_a_write(statement, ctes)

    def visit_SelectStmt(self, _parents: object, node: Any) -> None:  # noqa: N802 - pglast's names
        self._require_tenant(node.fromClause or (), node.whereClause)

    def visit_UpdateStmt(self, _parents: object, node: Any) -> None:  # noqa: N802
        self._require_tenant((node.relation, *(node.fromClause or ())), node.whereClause)
        for target in node.targetList:
            if target.name == "tenant_id":
                self.broken.append(TENANT_MOVED)
            for call in _nodes(target.val, ast.FuncCall):
                if _name(call) not in CALLED_IN_SET:
                    self.broken.append(VOLATILE_IN_SET)
            for either in _nodes(target.val, ast.CaseExpr, ast.CoalesceExpr):
                if any(_name(call) == "now" for call in _nodes(either, ast.FuncCall)):
                    self.broken.append(NOW_IN_CASE)
        self._returns(node)

    def visit_DeleteStmt(self, _parents: object, node: Any) -> None:  # noqa: N802
        self._require_tenant((node.relation, *(node.usingClause or ())), node.whereClause)
        self._returns(node)

    def visit_InsertStmt(self, _parents: object, node: Any) -> None:  # noqa: N802
        names = [column.name for column in node.cols or ()]
        query = node.selectStmt
        rows = query.valuesLists or [[target.val for target in query.targetList]]
        if "tenant_id" not in names or not all(_is_parameter(row[names.index("tenant_id")]) for row in rows):
            self.broken.append(TENANT_INSERTED)
        conflict = node.onConflictClause
        if conflict is not None and any(_nodes((conflict.targetList, conflict.whereClause), ast.FuncCall)):
            self.broken.append(CALL_IN_CONFLICT)
        self._returns(node)

    def visit_MergeStmt(self, _parents: object, _node: Any) -> None:  # noqa: N802
        self.broken.append(NO_MERGE)

    def _require_tenant(self, sources: Any, where: Any) -> None:
        tables = {_alias(table) for table in _sources(sources) if table.relname in OURS}
        conditions = [where, *(join.quals for join in _nodes(tuple(sources), ast.JoinExpr))]
        compared = {
            _column(condition.lexpr)
            for condition in _conjuncts(conditions)
            if isinstance(condition, ast.A_Expr)
            and _operator(condition) == "="
            and isinstance(condition.lexpr, ast.ColumnRef)
            and _is_parameter(condition.rexpr)
        }
        if any(not {f"{table}.tenant_id", "tenant_id"} & compared for table in tables):
            self.broken.append(TENANT)

    def _returns(self, node: Any) -> None:
        for call in _nodes(node.returningClause, ast.FuncCall):
            # The epoch of a time depends on nothing, and PostgreSQL calls it STABLE; that of an interval is IMMUTABLE.
            if _name(call) not in CALLED_IN_RETURNING or not isinstance(call.args[-1], ast.A_Expr):
                self.broken.append(STABLE_IN_RETURNING)

    def _beside_a_write(self, statement: Any, ctes: list[Any]) -> None:
        calls = {_name(call) for call in _nodes(statement, ast.FuncCall)}
        if calls & SETS or any(_nodes(statement, ast.RangeFunction)):
            self.broken.append(SET_BESIDE_WRITE)
        known = {*OURS, *(cte.ctename for cte in ctes)}
        for cte in ctes:
            if not any(table.relname in known for table in _nodes(cte.ctequery, ast.RangeVar)):
                self.broken.append(CONSTANT_CTE)


def _nodes(within: Any, *kinds: Any) -> Iterator[Any]:
    if isinstance(within, (tuple, list)):
        for part in within:
            yield from _nodes(part, *kinds)
    elif isinstance(within, ast.Node):
        if isinstance(within, kinds):
            yield within
        for attribute in within:
            yield from _nodes(getattr(within, attribute), *kinds)


def _sources(sources: Any) -> Iterator[Any]:
    """The tables of a FROM clause; not those of the subqueries in it, which have clauses of their own."""
    for source in sources:
        if isinstance(source, ast.RangeVar):
            yield source
        elif isinstance(source, ast.JoinExpr):
            yield from _sources((source.larg, source.rarg))


def _alias(table: Any) -> str:
    return str(table.alias.aliasname if table.alias else table.relname)


def _conjuncts(conditions: Any) -> Iterator[Any]:
    for condition in conditions:
        if isinstance(condition, ast.BoolExpr) and condition.boolop == 0:
            yield from _conjuncts(condition.args)
        elif condition is not None:
            yield condition


def _column(reference: Any) -> str:
    return ".".join(part.sval for part in reference.fields)


def _operator(condition: Any) -> str:
    return str(condition.name[-1].sval)


def _is_parameter(value: Any) -> bool:
    while isinstance(value, ast.TypeCast):
        value = value.arg
    return isinstance(value, ast.ParamRef)


def _name(call: Any) -> str:
    return str(call.funcname[-1].sval)
