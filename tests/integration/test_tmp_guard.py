"""A1..A2 first look"""
import heapq
import pytest
from sqlalchemy import select, text, event
from sqlalchemy.orm import Session, load_only, defer
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.exc import InvalidRequestError
from iot_models import DeviceState, ShadowService, Report

K=("acme","t")
@pytest.fixture
def e(own_engine):
    with Session(own_engine) as s, s.begin():
        s.add(DeviceState(tenant_id="acme",site_id="b",device_id="t",desired_state={"a":1,"queue":[5,1]}))
    return own_engine
def other(e, patch={"theirs":1}):
    with Session(e) as s, s.begin(): ShadowService(s,"acme").patch_desired("t",patch)
def now(e):
    with Session(e) as s: return s.get_one(DeviceState,K).desired_state
WR={
 "rr":lambda x:x.replace_reported("t",{"r":1}), "pr":lambda x:x.patch_reported("t",{"r":1}),
 "rd":lambda x:x.replace_desired("t",{"svc":1}), "pd":lambda x:x.patch_desired("t",{"svc":1}),
 "rdm":lambda x:x.replace_desired_many({"t":{"svc":1}}), "pdm":lambda x:x.patch_desired_many(["t"],{"svc":1}),
 "rrm":lambda x:x.replace_reported_many([Report("t",{"r":1})]),
}
@pytest.mark.parametrize("w",WR)
@pytest.mark.parametrize("assign",[True,False])
@pytest.mark.parametrize("theirs",[True,False])
def test_a1(e,w,assign,theirs):
    with Session(e,autoflush=False) as s:
        d=s.get_one(DeviceState,K)
        if assign: d.desired_state={"mine":1}
        else: d.desired_state["mine"]=1
        if theirs: other(e)
        WR[w](ShadowService(s,"acme"))
        if theirs or "d" in w:
            with pytest.raises(StaleDataError): s.commit()
        else:
            s.commit(); assert now(e)["mine"]==1
def lazily(s,e):
    d=s.scalars(select(DeviceState).options(load_only(DeviceState.desired_state))).one(); other(e); d.desired_version; return d
def deferred(s,e):
    d=s.scalars(select(DeviceState).options(defer(DeviceState.desired_version))).one(); other(e); d.desired_version; return d
def refreshed(s,e):
    d=s.get_one(DeviceState,K); other(e); s.refresh(d,["desired_version"]); return d
def expired(s,e):
    d=s.get_one(DeviceState,K); other(e); s.expire(d,["desired_version"]); d.desired_version; return d
def pe(s,e):
    d=s.get_one(DeviceState,K); other(e); s.scalars(select(DeviceState).options(load_only(DeviceState.desired_version)).execution_options(populate_existing=True)).one(); return d
def pe_doc(s,e):
    d=s.get_one(DeviceState,K); other(e); s.scalars(select(DeviceState).options(load_only(DeviceState.desired_state)).execution_options(populate_existing=True)).one(); return d
def partial(s,e):
    d=s.scalars(select(DeviceState).options(load_only(DeviceState.desired_state))).one(); other(e); s.scalars(select(DeviceState)).one(); return d
@pytest.mark.parametrize("how",[lazily,deferred,refreshed,expired,pe,pe_doc,partial])
def test_a2(e,how):
    with Session(e) as s:
        d=how(s,e); doc=dict(d.desired_state); d.desired_state["mine"]=1
        try: s.commit(); print(how.__name__,"committed",doc, now(e)); assert "theirs" in now(e)
        except (StaleDataError,InvalidRequestError) as x: print(how.__name__,type(x).__name__)
def test_version_first(e):
    with Session(e) as s:
        d=s.scalars(select(DeviceState).options(load_only(DeviceState.desired_version))).one()
        d.desired_state["mine"]=1; s.commit(); assert now(e)["mine"]==1
    with Session(e) as s:
        d=s.scalars(select(DeviceState).options(load_only(DeviceState.desired_version))).one(); other(e)
        d.desired_state["mine2"]=1
        with pytest.raises(StaleDataError): s.commit()
def test_insert_then_change(e):
    with Session(e) as s:
        d=DeviceState(tenant_id="acme",site_id="b",device_id="n"); s.add(d); s.flush(); d.desired_state["x"]=1; s.commit(); assert d.desired_version==1
        d2=DeviceState(tenant_id="acme",site_id="b",device_id="n2",desired_state={"y":1}); s.add(d2); s.flush(); d2.desired_state["x"]=1; s.flush(); d2.desired_state["z"]=1; s.commit(); assert d2.desired_version==2
def test_merge(e):
    with Session(e) as s: d=s.scalars(select(DeviceState).options(load_only(DeviceState.desired_state))).one()
    other(e)
    d.desired_state["mine"]=1
    with Session(e) as s:
        s.merge(d)
        with pytest.raises((StaleDataError,InvalidRequestError)): s.commit()
